# SPDX-License-Identifier: Apache-2.0

"""How many steps each phase gets: the model's own budget within the trainer's limits."""

import logging
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)

TEACHER_SHARE = 0.5
"""Share of the steps that the teacher gets; a quarter and three quarters detect the same."""
WARM_UP = 0.1
"""Share of a phase in which the learning rate rises."""


@dataclass(frozen=True)
class Budget:
    """Optimiser steps of both phases, the teacher's first.

    Attributes:
        teacher_steps (int): Steps of the teacher's phase.
        student_steps (int): Steps of the student's phase.
    """

    teacher_steps: int
    student_steps: int

    @property
    def total_steps(self) -> int:
        """Return the steps of both phases together."""
        return self.teacher_steps + self.student_steps

    def phase(self, step: int) -> Literal["teacher", "student"]:
        """Return the network that is trained in a step, counted from 0."""
        return "teacher" if step < self.teacher_steps else "student"

    def cut(self, step: int) -> "Budget":
        """Return what is left of the budget if training ends after so many steps."""
        teacher_steps = min(self.teacher_steps, step)
        return Budget(teacher_steps, step - teacher_steps)

    def describe(self, step: int) -> str:
        """Return in words how far a training has come after so many steps."""
        return f"step {step} of {self.total_steps}, in the {self.phase(max(0, step - 1))}'s phase"

    def schedule(self, optimizer: Optimizer, networks: Iterable[str]) -> LambdaLR:
        """Return the learning rates: within its phase, each network's rises and falls to zero along a cosine.

        Args:
            optimizer (Optimizer): One parameter group for each network.
            networks (Iterable[str]): ``"teacher"``, ``"student"`` or both.

        Returns:
            LambdaLR: Scheduler, to be called after each step.
        """
        spans = {"teacher": (0, self.teacher_steps), "student": (self.teacher_steps, self.total_steps)}
        factors: list[Callable[[int], float]] = [
            partial(learning_rate_factor, first=spans[network][0], last=spans[network][1]) for network in networks
        ]
        return LambdaLR(optimizer, factors)


def learning_rate_factor(step: int, first: int, last: int) -> float:
    """Return the factor of the learning rate in a step of the phase from ``first`` to ``last``, 0 outside of it."""
    progress = min(max((step - first + 1) / (last - first + 1), 0.0), 1.0)
    return min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress))


def fit_into(trainer: Any, train_steps: int, networks: Collection[str]) -> Budget:
    """Fit the phases into the trainer's limits, and make the trainer stop where they end.

    To be called from ``configure_optimizers``, where Lightning knows the number of training batches.

    The trainer's end is moved to the budget's, so that the progress bar shows it, and validation to that end, because
    every epoch it would cost as much as training, unless the user asked for another interval. Both are public
    attributes, but ``trainer_arguments``, the way that anomalib has for it, would override what the user asked for.

    Args:
        trainer (Trainer): Trainer that has been given its data; its ``max_epochs`` and ``check_val_every_n_epoch``
            are changed.
        train_steps (int): Steps of both phases together, rounded up to whole epochs.
        networks (Collection[str]): ``"teacher"``, ``"student"`` or both, those that are to be trained.

    Returns:
        Budget: Steps of each phase.

    Raises:
        ValueError: If the training data is endless, or there are fewer steps than phases.
    """
    if trainer.max_epochs in {None, -1}:
        trainer.fit_loop.max_epochs = train_steps  # no epoch has less than one step
    available = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    if math.isinf(batches):
        msg = "DHKD passes over all training images, so the train dataloader must have a length; it has none."
        raise ValueError(msg)
    steps_per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    total = int(min(available, math.ceil(train_steps / steps_per_epoch) * steps_per_epoch))
    if total < len(networks) and not trainer.fast_dev_run:
        msg = (
            f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} and {batches} training batches leave "
            f"{total} step(s), but DHKD needs at least {len(networks)}, one for each phase."
        )
        raise ValueError(msg)
    share = TEACHER_SHARE if len(networks) > 1 else float("teacher" in networks)
    teacher_steps = math.ceil(share * total)
    budget = Budget(teacher_steps, total - teacher_steps)
    epochs = max(1, math.ceil(total / steps_per_epoch))
    trainer.fit_loop.max_epochs = epochs
    if trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0:
        trainer.check_val_every_n_epoch = epochs
    logger.info(
        "DHKD trains for %d steps (%d epochs): %d for the teacher, %d for the student.",
        total,
        epochs,
        budget.teacher_steps,
        budget.student_steps,
    )
    return budget
