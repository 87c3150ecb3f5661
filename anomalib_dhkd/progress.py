# SPDX-License-Identifier: Apache-2.0

"""Bars for what takes long outside of the training steps."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


def track(trainer: Any, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """Yield items, and show how many there were in a bar of the trainer's progress bar, with an estimate of the time.

    Args:
        trainer (Trainer): Trainer whose progress bar is used, if it has one by rich.
        items (Iterable[Item]): Items.
        description (str): What is done.
        total (int): Number of items.

    Yields:
        Item: The items, one after the other.
    """
    progress = getattr(trainer.progress_bar_callback, "progress", None)
    if progress is None:
        yield from items
        return
    task = progress.add_task(description, total=total)
    for item in items:
        yield item
        progress.advance(task)
    # Lightning finds its own bars by their number among all, so none may be removed.
    progress.update(task, visible=False)
