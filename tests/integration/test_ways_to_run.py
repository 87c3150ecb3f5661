# SPDX-License-Identifier: Apache-2.0

"""Ways in which people run anomalib around a training: loggers, callbacks, searches, one Engine for several models."""

import csv
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.loggers import AnomalibMLFlowLogger, AnomalibTensorBoardLogger, AnomalibWandbLogger
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger

from anomalib_dhkd import Dhkd, Quickstart
from tests.helpers import fit, mounted, small_dhkd

LOGGED = {"phase", "teacher_loss", "student_loss", "lr-Adam/pg1", "lr-Adam/pg2", "image_AUROC", "teacher_shift"}
"""Some of what the loggers get: losses and phase, learning rates, metrics of the test, diagnostics."""


def _train(quickstart: Quickstart, folder: Path, logger: Any) -> set[str]:
    """Train and test with a logger, and return the names of the pictures that it should have, in the results."""
    model = small_dhkd(train_steps=8)
    callbacks: Any = [LearningRateMonitor()]
    engine = Engine(
        default_root_dir=folder, logger=logger, callbacks=callbacks, log_every_n_steps=1, enable_progress_bar=False
    )
    engine.train(model=model, datamodule=quickstart)
    images = Path(engine.trainer.default_root_dir) / "images"
    kinds = {path.parent for path in images.rglob("*.png")}
    return {min(kind.glob("*.png")).relative_to(images).as_posix() for kind in kinds}


def test_csv(quickstart: Quickstart, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    _train(quickstart, tmp_path, logger)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() >= LOGGED
    phases = [float(row["phase"]) for row in rows if row["phase"]]
    assert phases == [1, 1, 1, 1, 2, 2, 2, 2]
    assert sum(bool(row["teacher_loss"]) for row in rows) == sum(bool(row["student_loss"]) for row in rows) == 4


def test_tensorboard(quickstart: Quickstart, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = AnomalibTensorBoardLogger(tmp_path / "logs")
    pictures = _train(quickstart, tmp_path, logger)
    events = event_accumulator.EventAccumulator(str(logger.log_dir)).Reload()
    assert set(events.Tags()["scalars"]) >= LOGGED
    assert [event.value for event in events.Scalars("phase")] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert set(events.Tags()["images"]) == pictures
    assert len(pictures) == 6


def test_mlflow(quickstart: Quickstart, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    logger = AnomalibMLFlowLogger(
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=(tmp_path / "artifacts").as_uri()
    )
    pictures = _train(quickstart, tmp_path, logger)
    assert logger.experiment.get_run(logger.run_id).data.metrics.keys() >= LOGGED
    (artifacts,) = (tmp_path / "artifacts").glob("*/artifacts")
    assert {path.relative_to(artifacts).as_posix() for path in artifacts.rglob("*.png")} == pictures


def test_wandb_offline(quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = AnomalibWandbLogger(save_dir=tmp_path, offline=True, log_model=False)
    pictures = _train(quickstart, tmp_path, logger)
    summary = logger.experiment.summary
    assert set(summary.keys()) >= LOGGED
    logger.experiment.finish()
    assert len(list(tmp_path.rglob("media/images/*.png"))) >= len(pictures)


def test_a_search_by_a_loop(quickstart: Quickstart, tmp_path: Path) -> None:
    """Each model has an Engine of its own, all have one data module, and the best one is used afterwards."""
    found = {}
    for width in (2, 8):
        engine, _ = fit(quickstart, tmp_path / str(width), small_dhkd(width=width, train_steps=8))
        (metrics,) = engine.test(datamodule=quickstart, verbose=False)
        found[width] = metrics["image_AUROC"]
        assert os.path.realpath(engine.best_model_path).startswith(str(tmp_path / str(width)))
    assert all(0 <= value <= 1 for value in found.values())
    again, _ = fit(quickstart, tmp_path / "again", small_dhkd(width=2, train_steps=8))
    (metrics,) = again.test(datamodule=quickstart, verbose=False)
    assert metrics["image_AUROC"] == pytest.approx(found[2], abs=1e-6)


def test_each_way_alone(trained: Any, quickstart: Quickstart) -> None:
    """What a checkpoint is asked first makes no difference."""
    found = {}
    for first in ("validate", "test", "predict"):
        model = Dhkd()  # which becomes the checkpoint's
        engine = Engine(default_root_dir=trained.checkpoint.parent / first, enable_progress_bar=False)
        arguments: dict[str, Any] = {"model": model, "datamodule": quickstart, "ckpt_path": trained.checkpoint}
        getattr(engine, first)(**arguments)
        batches: Any = engine.predict(**arguments)
        found[first] = torch.cat([batch.pred_score.flatten() for batch in batches])
    assert len(found["test"]) == 12
    for scores in found.values():
        torch.testing.assert_close(scores, found["test"], rtol=0, atol=0)


def test_data_are_only_read(quickstart: Quickstart, tmp_path: Path) -> None:
    quickstart.prepare_data()
    with mounted(tmp_path / "data", "--bind", "-o", "ro", str(quickstart.root / "brick")):
        with pytest.raises(OSError, match="Read-only file system"):
            (tmp_path / "data" / "file").touch()
        datamodule = Folder(
            "parts", root=tmp_path / "data", num_workers=0,
            normal_dir="train/good", abnormal_dir="test/hole", normal_test_dir="test/good",
        )  # fmt: skip
        model = small_dhkd(train_steps=2)
        engine = Engine(default_root_dir=tmp_path / "results", enable_progress_bar=False)
        engine.train(model=model, datamodule=datamodule)
    assert model.finished


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_results_that_cannot_be_written_are_an_error_before_training(
    kind: str, quickstart: Quickstart, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    model = small_dhkd()
    with ExitStack() as stack:
        if kind == "file":
            folder.touch()
        else:
            stack.enter_context(mounted(folder, "-t", "tmpfs", "-o", "ro", "tmpfs"))
        engine = Engine(default_root_dir=folder / "mine", enable_progress_bar=False)
        with pytest.raises(OSError, match=f"{folder}/mine"):
            engine.train(model=model, datamodule=quickstart)
    assert not model.has_weights  # which are read first
