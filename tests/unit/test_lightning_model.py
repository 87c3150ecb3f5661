# SPDX-License-Identifier: Apache-2.0

"""Arguments, phases and budget of the Lightning module, in anomalib's real engine."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import AnomalibDataset
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_dhkd import Dhkd, Quickstart
from anomalib_dhkd.components.features import FeaturePyramid
from tests.conftest import SMALL


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("positional_channels", 6),
        ("positional_channels", -4),
        ("flow_steps", -1),
        ("flow_channels", 0),
        ("student_blocks", -1),
        ("student_channels", 0),
        ("noise_std", -0.1),
        ("noise_coverage", 0.0),
        ("noise_coverage", 1.5),
        ("affinity_weight", -1.0),
        ("mixture", 1),
        ("image_score", "median"),
        ("train_steps", 1),
        ("teacher_share", 0.0),
        ("teacher_share", 1.0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("cache_limit", -1.0),
    ],
)
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be .*, got {value!r}"):
        Dhkd(**{argument: value})


def test_a_model_needs_teacher_or_student() -> None:
    with pytest.raises(ValueError, match="student_blocks must be above 0 when flow_steps is 0, got 0"):
        Dhkd(flow_steps=0, student_blocks=0)


class Recorder(Callback):
    """Records phase, losses, gradients and learning rates of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validations: list[int] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.steps.append(
            {
                "step": trainer.global_step,
                "phase": module.phase,
                "teacher": _has_gradient(module.model.teachers),
                "student": _has_gradient(module.model.students),
                "rates": [group["lr"] for group in optimizer.param_groups],
            }
        )

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        del module, args
        if self.steps:  # else the gradients of the first step are still being accumulated
            self.steps[-1]["logged"] = {key: float(value) for key, value in trainer.progress_bar_metrics.items()}

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        del module
        self.validations.append(trainer.global_step)


def _has_gradient(module: torch.nn.Module | None) -> bool:
    return module is not None and any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())


def _fit(
    datamodule: Quickstart,
    folder: Path,
    model: Dhkd,
    ckpt_path: Path | None = None,
    **trainer: Any,
) -> tuple[Engine, Recorder]:
    recorder = Recorder()
    engine = Engine(default_root_dir=folder, callbacks=[recorder], **({"enable_progress_bar": False} | trainer))
    engine.fit(model=model, datamodule=datamodule, ckpt_path=ckpt_path)
    return engine, recorder


def _phases(recorder: Recorder) -> str:
    return "".join(step["phase"][0] for step in recorder.steps)


@pytest.mark.parametrize(
    ("train_steps", "trainer", "expected"),
    [
        (6, {}, "tttsss"),
        (5, {}, "tttsss"),  # rounded up to whole epochs of two batches
        (6, {"max_epochs": 100}, "tttsss"),
        (6, {"max_epochs": -1}, "tttsss"),
        (1000, {"max_epochs": 1}, "ts"),
        (1000, {"max_steps": 3}, "tts"),
        (1000, {"max_epochs": 2, "limit_train_batches": 1}, "ts"),
        (1000, {"max_epochs": 2, "accumulate_grad_batches": 2}, "ts"),
    ],
)
def test_budget(
    quickstart: Quickstart, tmp_path: Path, train_steps: int, trainer: dict[str, Any], expected: str
) -> None:
    engine, recorder = _fit(quickstart, tmp_path, Dhkd(**SMALL, train_steps=train_steps), **trainer)
    assert _phases(recorder) == expected
    assert engine.trainer.global_step == len(expected)
    # What the progress bar counts up to is where training ended.
    assert engine.trainer.max_epochs in {engine.trainer.current_epoch, -1}
    assert engine.trainer.max_steps in {len(expected), -1}
    # Whatever ended the run, the last weights were validated and saved.
    assert recorder.validations[-1] == len(expected)
    assert torch.load(engine.best_model_path, weights_only=True)["global_step"] == len(expected)


def test_each_phase_trains_one_network_only(quickstart: Quickstart, tmp_path: Path) -> None:
    _, recorder = _fit(quickstart, tmp_path, Dhkd(**SMALL, train_steps=8))
    assert [step["teacher"] for step in recorder.steps] == [True] * 4 + [False] * 4
    assert [step["student"] for step in recorder.steps] == [False] * 4 + [True] * 4
    rates = [step["rates"][step["phase"] == "student"] for step in recorder.steps]
    assert all(0 < rate <= 1e-2 for rate in rates)


def test_losses_and_phase_are_in_the_progress_bar(quickstart: Quickstart, tmp_path: Path) -> None:
    _, recorder = _fit(quickstart, tmp_path, Dhkd(**SMALL, affinity_weight=1, train_steps=4), enable_progress_bar=True)
    teacher, student = recorder.steps[0]["logged"], recorder.steps[-1]["logged"]
    assert teacher["phase"] == 1
    assert "teacher_loss" in teacher
    assert student["phase"] == 2
    assert {"student_loss", "affinity_loss"} <= set(student)


@pytest.mark.parametrize(
    ("changes", "expected", "absent"),
    [
        ({"flow_steps": 0}, "ssss", "teacher_loss"),
        ({"student_blocks": 0}, "tttt", "student_loss"),
        ({"affinity_weight": 0.0}, "ttss", "affinity_loss"),
    ],
)
def test_switched_off_parts_take_no_part(
    quickstart: Quickstart, tmp_path: Path, changes: dict[str, Any], expected: str, absent: str
) -> None:
    _, recorder = _fit(quickstart, tmp_path, Dhkd(**(SMALL | {"affinity_weight": 1.0} | changes), train_steps=4))
    assert _phases(recorder) == expected
    assert absent not in {name for step in recorder.steps for name in step["logged"]}


def _checkpoints(folder: Path) -> list[Callback]:
    """Return callbacks that save after every step and after every epoch, the ways in which users do."""
    return [
        ModelCheckpoint(folder, "step-{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(folder, "epoch-{step}", every_n_epochs=1, save_top_k=-1, auto_insert_metric_name=False),
    ]


@pytest.mark.parametrize("limit", [{}, {"max_steps": 7}])
def test_resumed_run_lands_in_the_right_phase(quickstart: Quickstart, tmp_path: Path, limit: dict[str, int]) -> None:
    model = Dhkd(**SMALL, train_steps=8)
    engine = Engine(
        default_root_dir=tmp_path, callbacks=_checkpoints(tmp_path / "saved"), enable_progress_bar=False, **limit
    )
    engine.fit(model=model, datamodule=quickstart)
    steps = engine.trainer.global_step
    statistics = {key: value for key, value in model.state_dict().items() if "features.statistics" in key}
    assert statistics
    saved = sorted((tmp_path / "saved").glob("*.ckpt"))
    assert len(saved) > steps

    for path in saved:
        stop = int(path.stem.split("-")[1])
        resumed = Dhkd(**SMALL, train_steps=8)
        engine, recorder = _fit(quickstart, tmp_path, resumed, ckpt_path=path, **limit)
        assert _phases(recorder) == "ttttssss"[stop:steps], path.name
        assert engine.trainer.global_step == steps
        if stop < steps:
            assert (resumed.model.anomaly_map_generator.log_mean != 0).all()
        # The teacher was trained on these statistics: a resumed run must keep them.
        assert all(torch.equal(resumed.state_dict()[key], value) for key, value in statistics.items())


def test_too_few_steps(quickstart: Quickstart, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_steps=1 .* leave 1 step.* needs at least 2"):
        _fit(quickstart, tmp_path, Dhkd(**SMALL), max_steps=1)


def test_fast_dev_run(quickstart: Quickstart, tmp_path: Path) -> None:
    engine, recorder = _fit(quickstart, tmp_path, Dhkd(**SMALL), fast_dev_run=True)
    assert len(recorder.steps) == engine.trainer.global_step == 1


def test_statistics_come_from_training_images_alone(
    quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for name in ("fit", "calibrate"):
        owner = "components.features.FeaturePyramid" if name == "fit" else "torch_model.DhkdModel"

        def counted(self: Any, batches: Any, name: str = name) -> None:
            del self
            batches = batches() if name == "calibrate" else batches
            seen.append(f"{name}: {sum(len(features[0]) for features in batches)}")

        monkeypatch.setattr(f"anomalib_dhkd.{owner}.{name}", counted)
    _fit(quickstart, tmp_path, Dhkd(**SMALL, train_steps=2))
    assert seen == ["fit: 8", "calibrate: 8"]


def _losses(quickstart: Quickstart, folder: Path, **arguments: Any) -> list[float]:
    torch.manual_seed(0)
    losses: list[float] = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *args: Any) -> None:
            losses.append(float(outputs["loss"]))

    engine = Engine(default_root_dir=folder, callbacks=[Losses()], enable_progress_bar=False)
    engine.fit(model=Dhkd(**SMALL, train_steps=8, noise_std=0, **arguments), datamodule=quickstart)
    return losses


@pytest.mark.parametrize("cache_limit", [2.0, 0.0])
def test_training_on_kept_features_is_training_on_images(
    quickstart: Quickstart, tmp_path: Path, cache_limit: float
) -> None:
    """The same batches in the same order, up to half precision; each image is read and extracted once."""
    expected = _losses(quickstart, tmp_path / "images", cache_limit=None)
    assert _losses(quickstart, tmp_path / "kept", cache_limit=cache_limit) == pytest.approx(expected, rel=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of mapped files")
def test_the_file_is_gone_after_training(quickstart: Quickstart, tmp_path: Path) -> None:
    class Mapped(Callback):
        during = False

        def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
            del trainer, module
            self.during = _maps_a_deleted_file()

    mapped = Mapped()
    engine = Engine(default_root_dir=tmp_path, callbacks=[mapped], enable_progress_bar=False)
    engine.fit(model=Dhkd(**SMALL, train_steps=2, cache_limit=0.0), datamodule=quickstart)
    assert mapped.during
    assert not _maps_a_deleted_file()


def _maps_a_deleted_file() -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(tempfile.gettempdir() in line and line.endswith("(deleted)") for line in lines)


def test_images_are_read_and_extracted_once(
    quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"read": 0, "extracted": 0}
    read, extract = AnomalibDataset.__getitem__, FeaturePyramid.extract

    def counted_read(self: Any, index: int) -> Any:
        counts["read"] += self is quickstart.train_data
        return read(self, index)

    def counted_extract(self: Any, images: torch.Tensor) -> Any:
        counts["extracted"] += len(images)
        return extract(self, images)

    monkeypatch.setattr(AnomalibDataset, "__getitem__", counted_read)
    monkeypatch.setattr(FeaturePyramid, "extract", counted_extract)
    _fit(quickstart, tmp_path, Dhkd(**SMALL, train_steps=8), limit_val_batches=0)
    assert counts == {"read": 8, "extracted": 8}


def test_augmented_images_are_not_kept(
    quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quickstart.train_augmentations = RandomHorizontalFlip()
    with caplog.at_level("INFO", logger="anomalib_dhkd"):
        _fit(quickstart, tmp_path, Dhkd(**SMALL, train_steps=2), limit_val_batches=0)
    assert "Features are extracted at every step, because the training images may be augmented." in caplog.text
