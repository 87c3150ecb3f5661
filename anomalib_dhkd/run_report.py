# SPDX-License-Identifier: Apache-2.0

"""One page after each training, ``report.html`` in the run's folder: what was trained on, and what came of it."""

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from .pages import embed, render, wide_figure
from .run_summary import Evaluated, facts_of, results_of

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """A batch of the training: whose phase it was in, its loss, and when it was done, in seconds."""

    phase: str
    loss: float
    time: float


def _harmless(hook: Callable) -> Callable:
    """Make a hook of no consequence for the training: the first process runs it, and an error ends the report only."""

    @functools.wraps(hook)
    def guarded(self: "RunReport", trainer: Any, *args: Any, **kwargs: Any) -> None:
        if not self.active or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        try:
            hook(self, trainer, *args, **kwargs)
        except Exception as error:  # noqa: BLE001
            self.active, self.place = False, None
            logger.warning("The report of this training isn't written: %s: %s", type(error).__name__, error)

    return guarded


class RunReport(Callback):
    """Notes what happens in a training and in the test after it, and writes the page.

    It is written at the end of ``fit``, and anew after a test into the same folder on the same data.

    Attributes:
        active (bool): Whether what happens belongs on the page.
        place (tuple | None): Where the checkpoint of the training is, and what the training's data is.
        facts (dict[str, Any]): What the page says apart from the results.
        steps (list[Step]): Batches of the training.
        times (dict[str, float]): When the parts of the run began, in seconds.
        evaluated (Evaluated): Validation images, or test images.
    """

    def __init__(self) -> None:
        self.active = False
        self.place: tuple[Any, ...] | None = None
        self.facts: dict[str, Any] = {}
        self.steps: list[Step] = []
        self.times: dict[str, float] = {}
        self.evaluated = Evaluated()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Begin anew with a training."""
        del pl_module  # Unused argument.
        if stage == "fit":
            self.place, self.steps, self.times = _place(trainer), [], {"begin": time.perf_counter()}
        self.active = self.place is not None and stage in {"fit", "test"} and self.place == _place(trainer)

    @_harmless
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note when the first step begins."""
        self.times.setdefault("first step", time.perf_counter())

    @_harmless
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the loss."""
        phase = pl_module.budget.phase(max(0, trainer.global_step - 1))
        self.steps.append(Step(phase, float(outputs["loss"]), time.perf_counter()))

    @_harmless
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew with the images."""
        self.evaluated = Evaluated()

    @_harmless
    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Note scores, which aren't normalised yet."""
        self.evaluated.add(outputs, sum(trainer.num_val_batches))

    @_harmless
    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew with the images, unless they are to be tested with another checkpoint."""
        own = (None, self.facts["resumed"], self.facts["checkpoint"])
        self.active = str(trainer.ckpt_path) in map(str, own)
        self.evaluated = Evaluated()
        self.times["test"] = time.perf_counter()

    @_harmless
    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any, **kwargs: Any) -> None:
        """Note scores, which are normalised."""
        self.evaluated.add(outputs, sum(trainer.num_test_batches))

    @_harmless
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write the page."""
        folder = Path(trainer.checkpoint_callback.dirpath)
        folder = folder.parents[1] if folder.parts[-2:] == ("weights", "lightning") else folder  # anomalib's way
        if stage == "fit":
            self.times["end"] = time.perf_counter()
            self.facts = {**facts_of(trainer, pl_module, folder), "losses": self._losses()}
        results = results_of(trainer, pl_module, stage, self.evaluated)
        page = render("run_report.html", **self.facts, **results, seconds=self._seconds())
        (folder / "report.html").write_text(page, encoding="utf-8")
        logger.info("Report: %s", folder / "report.html")
        if self.facts["commands"]:
            logger.info("Next: %s", next(iter(self.facts["commands"].values())))
        self.evaluated = Evaluated()  # a model takes no more memory than before

    def _seconds(self) -> dict[str, float]:
        """Return how long each part of the run took in seconds."""
        first = last = self.times.get("first step", self.times["end"])
        seconds = {"reading images, extracting features": first - self.times["begin"]}
        for phase in ("teacher", "student"):
            if times := [step.time for step in self.steps if step.phase == phase]:
                seconds[f"{phase}'s phase"] = times[-1] - last
                last = times[-1]
        seconds["mixtures, calibration, validation, saving"] = self.times["end"] - last
        if "test" in self.times:
            seconds["test"] = time.perf_counter() - self.times["test"]
        return seconds

    def _losses(self) -> str:
        """Return the picture of the losses; empty without a step."""
        phases = list(dict.fromkeys(step.phase for step in self.steps))
        if not phases:
            return ""
        figure = wide_figure(2.8)
        for axes, phase in zip(figure.subplots(1, len(phases), squeeze=False)[0], phases, strict=True):
            steps = [(number, step.loss) for number, step in enumerate(self.steps, 1) if step.phase == phase]
            axes.plot(*zip(*steps, strict=True))
            axes.set(title=f"Loss of the {phase}", xlabel="batch")
        return embed(figure)


def _place(trainer: Any) -> tuple[Any, ...] | None:
    """Return what tells a run from others: folder of its checkpoint, and data; ``None`` for what has no page.

    That is a run without a checkpoint, and one of anomalib's tiled ensemble, whose models see a tile of each image.
    """
    callback, datamodule = trainer.checkpoint_callback, trainer.datamodule
    tiled = getattr(datamodule, "external_collate_fn", None) is not None
    if not isinstance(callback, ModelCheckpoint) or not callback.dirpath or tiled:
        return None
    names = (str(getattr(datamodule, name, "")) for name in ("name", "category", "root"))
    return str(callback.dirpath), type(datamodule), *names
