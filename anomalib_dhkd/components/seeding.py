# SPDX-License-Identifier: Apache-2.0

"""Random numbers that follow from a seed, without a trace in PyTorch's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draw random numbers on the CPU from a seed and leave PyTorch's own as they were; with None draw those."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
