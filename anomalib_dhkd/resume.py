# SPDX-License-Identifier: Apache-2.0

"""How a training ends, whatever ends it, and from where it can be resumed."""

import logging
from collections.abc import Iterable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from .budget import Budget
from .checkpoint import stage_of

logger = logging.getLogger(__name__)

SAVES = 20
"""How often at most a training saves itself for being resumed."""
KEY = "dhkd_training"
"""Where in a checkpoint it says how far the training has come."""


class UnfinishedError(RuntimeError):
    """There is no finished model, and the message says why not."""


class ResumableMixin(AnomalibModule):
    """Keeps in the checkpoint how far a training has come, and refuses to use a model that isn't finished.

    Attributes:
        budget (Budget): Steps of both phases; of a training that was cut short, those that it did.
        seed (int): What all random numbers of a training follow from, so that a resumed run draws the same.
        calibrated_step (int): Step after which mixture and distances were last calibrated, -1 for never.
        finished_checkpoint (bool): Whether the finished model was saved.
        resumed_budget (Budget | None): Steps of the training that the checkpoint was loaded from.
        resumed_from (str | Path | None): That checkpoint.
    """

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self.budget = Budget(0, 0)
        self.seed = 0
        self.calibrated_step = -1
        self.finished_checkpoint = False
        self.resumed_budget: Budget | None = None
        self.resumed_from: str | Path | None = None

    @property
    def finished(self) -> bool:
        """Whether training has come to its end and the model is calibrated since."""
        return self.calibrated_step == self.budget.total_steps

    def seed_of(self, purpose: int) -> int:
        """Return a seed that follows from the training's, the step and a number for what it is used for."""
        sequence = np.random.SeedSequence([self.seed, self.trainer.global_step, purpose])
        return int(sequence.generate_state(1, np.uint64)[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how far the training has come."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = {**asdict(self.budget), "calibrated_step": self.calibrated_step, "seed": self.seed}
        self.finished_checkpoint = self.finished

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over how far a training has come.

        Raises:
            UnfinishedError: If the checkpoint is of an unfinished training and isn't loaded to resume it.
        """
        state = dict(checkpoint[KEY])
        calibrated_step, seed = state.pop("calibrated_step"), state.pop("seed", self.seed)
        budget = Budget(**state)
        fitting = stage_of(self) == TrainerFn.FITTING
        path = self.trainer.ckpt_path if stage_of(self) else None
        if not fitting and self.finished and path is not None and path == self.resumed_from:
            # Engine.train tests what it was resumed from, not what came of it.
            logger.warning("Using the model as it was trained, not the checkpoint that it was resumed from.")
            checkpoint["state_dict"] = self.state_dict()
            checkpoint.pop("callbacks", None)  # they would forget where the finished checkpoint is
            return
        if not fitting and calibrated_step != budget.total_steps:
            msg = (
                f"The checkpoint is of an unfinished training (step {checkpoint['global_step']} of "
                f"{budget.total_steps}); `anomalib train` with it as --ckpt_path finishes the model."
            )
            raise UnfinishedError(msg)
        super().on_load_checkpoint(checkpoint)
        self.resumed_from = path if fitting else None
        self.budget, self.calibrated_step, self.resumed_budget, self.seed = budget, calibrated_step, budget, seed


class TrainingEnd(Callback):
    """Leaves a finished model behind, or an error.

    A run that was cut short in the student's phase, by ``max_time`` or early stopping, is finished with the weights
    that it has: mixture, calibration, threshold, checkpoint. One that was cut short before has no student, which is an
    error. While training, ``unfinished.ckpt`` is saved beside the place of the finished checkpoint, to go on from after
    whatever else may happen.
    """

    def __init__(self) -> None:
        self.saved_step = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin anew."""
        del trainer  # Unused argument.
        if stage == "fit":
            pl_module.budget, pl_module.calibrated_step, pl_module.finished_checkpoint = Budget(0, 0), -1, False
            pl_module.resumed_budget = pl_module.resumed_from = None
            seed = pl_module.hparams["seed"]
            pl_module.seed = torch.initial_seed() if seed is None else seed

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Say if a run is resumed with another budget than it began with."""
        del trainer  # Unused argument.
        if pl_module.resumed_budget not in {None, pl_module.budget}:
            logger.warning(
                "Resumed with %d steps of the teacher and %d of the student, begun with %d and %d: phases and learning "
                "rates follow the former.",
                *astuple(pl_module.budget),
                *astuple(pl_module.resumed_budget),
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin new random numbers, which depend on nothing that a resumed run hasn't done."""
        del trainer, batch  # Unused arguments.
        torch.manual_seed(pl_module.seed_of(batch_idx))

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Calibrate the model as it is, unless it is calibrated; outside of training, warn if it isn't finished."""
        if trainer.state.fn != TrainerFn.FITTING:
            self.on_test_start(trainer, pl_module)
        elif pl_module.calibrated_step != trainer.global_step:
            pl_module.calibrate()

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn of a model that isn't finished."""
        del trainer  # Unused argument.
        if not pl_module.finished:
            logger.warning("This model isn't trained to its end; its scores mean nothing.")

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn of a model that isn't finished."""
        self.on_test_start(trainer, pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        """Stop at a loss that isn't finite, before it reaches the weights.

        Raises:
            UnfinishedError: If it is such.
        """
        self._check_finite(trainer, pl_module, "loss", [loss])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save what a resumed run needs: at the end of an epoch, unless these are rare."""
        del outputs, batch, batch_idx  # Unused arguments.
        interval = pl_module.budget.total_steps / SAVES
        if trainer.is_last_batch or trainer.num_training_batches > interval:
            path = _path(trainer)
            # Not after the last one: what is left then isn't steps, and Lightning goes on with nothing else.
            left = pl_module.budget.total_steps - trainer.global_step
            if path is not None and left > 0 and trainer.global_step - self.saved_step >= interval:
                self._check_finite(trainer, pl_module, "weights", pl_module.parameters())
                trainer.save_checkpoint(path)
                self.saved_step = trainer.global_step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the model.

        Raises:
            UnfinishedError: If training ended in the teacher's phase, with a student untrained, or the weights aren't
                finite.
        """
        self._check_finite(trainer, pl_module, "weights", pl_module.parameters())
        step, budget = trainer.global_step, pl_module.budget
        if step < budget.total_steps:
            cut = budget.cut(step)
            if budget.student_steps and not cut.student_steps:
                msg = (
                    f"Training was stopped after {budget.describe(step)}: the student is untrained and there is no "
                    "finished model. Allow more time, or let early stopping watch student_loss. "
                    f"{self._way_on(trainer)}"
                )
                raise UnfinishedError(msg)
            logger.warning(
                "Training was cut short after %s. The model is finished with the weights of that step.",
                budget.describe(step),
            )
            pl_module.budget = cut
        if not pl_module.finished:
            pl_module.calibrate()
            # Lightning validates after a batch or an epoch only; by then the end wasn't known.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        if trainer.checkpoint_callback and not pl_module.finished_checkpoint and not trainer.fast_dev_run:
            # Lightning saves after a validation. There was none, or it came before this was known to be the end.
            callback = trainer.checkpoint_callback
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                callback.best_model_path = str(Path(callback.dirpath) / "model.ckpt")
                trainer.save_checkpoint(callback.best_model_path)
        if (path := _path(trainer)) is not None and trainer.is_global_zero:
            path.unlink(missing_ok=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell a run that trained nothing from one that is done.

        Raises:
            UnfinishedError: If the model isn't finished.
        """
        if not pl_module.finished and not trainer.fast_dev_run:
            msg = (
                f"No step was trained (max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}, "
                f"limit_train_batches={trainer.limit_train_batches}, {trainer.global_step} steps done before) and the "
                "model isn't finished. An Engine trains once: make a new one for another training."
            )
            raise UnfinishedError(msg)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Say what an interrupted run leaves behind."""
        if pl_module.budget.total_steps and not pl_module.finished and not isinstance(exception, UnfinishedError):
            logger.error(
                "Training ended after %s, without a finished model (%s). %s",
                pl_module.budget.describe(trainer.global_step),
                type(exception).__name__,
                self._way_on(trainer),
            )

    def _check_finite(self, trainer: Any, pl_module: Any, name: str, values: Iterable[torch.Tensor]) -> None:
        if not all(value.isfinite().all() for value in values):
            msg = (
                f"Not all of the {name} are finite after {pl_module.budget.describe(trainer.global_step)}. Look at the "
                f"training images, or try --trainer.precision 32-true. {self._way_on(trainer)}"
            )
            raise UnfinishedError(msg)

    def _way_on(self, trainer: Any) -> str:
        if (path := _path(trainer)) is not None and self.saved_step:
            return f"`--ckpt_path {path}` resumes it from step {self.saved_step}."
        return "Nothing was saved yet to resume it from."


def _path(trainer: Any) -> Path | None:
    """Return where the checkpoint of an unfinished training goes, beside the finished one's place."""
    callback = trainer.checkpoint_callback
    if trainer.fast_dev_run or not isinstance(callback, ModelCheckpoint) or not callback.dirpath:
        return None
    return Path(callback.dirpath) / "unfinished.ckpt"
