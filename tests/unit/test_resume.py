# SPDX-License-Identifier: Apache-2.0

"""However a training ends: a finished model, or one clear error, and a way on."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.engine import Engine
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer

from anomalib_dhkd import Dhkd, Quickstart
from anomalib_dhkd.resume import UnfinishedError
from tests.helpers import Trained, assert_same, fit, small_dhkd


class TimeUp(Timer):
    """Lightning's Timer, by which ``max_time`` ends a run, with a clock that is up at a step."""

    def __init__(self, step: int) -> None:
        super().__init__(duration=timedelta(days=1))
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= self.step:
            self.load_state_dict({"time_elapsed": {"train": 2 * 24 * 3600}})
        super().on_train_batch_end(trainer, *args, **kwargs)


class Raise(Callback):
    """Ends a run at a step with an exception."""

    def __init__(self, step: int, exception: BaseException) -> None:
        self.step = step
        self.exception = exception

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise self.exception


def _early_stopping(loss: str) -> EarlyStopping:
    """Lightning's early stopping, as eager as it can be: it ends the run after two epochs with the loss."""
    return EarlyStopping(loss, min_delta=1e9, patience=1, strict=False)


def _assert_finished(engine: Engine, model: Dhkd) -> None:
    """Assert that model and checkpoint have both networks, mixture, calibration and threshold."""
    step = engine.trainer.global_step
    restored = Dhkd.load_from_checkpoint(engine.best_model_path)
    for one in (model, restored):
        assert one.finished
        assert one.budget.student_steps > 0
        assert one.budget.total_steps == step
        assert (one.model.anomaly_map_generator.log_mean != 0).all()
        assert one.model.mixtures["mixture"].means.abs().sum() > 0
        assert one.post_processor.image_threshold.isfinite()
        assert one.post_processor.pixel_threshold.isfinite()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert [path.name for path in Path(engine.best_model_path).parent.iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize(
    ("callback", "phases"),
    [
        (TimeUp(6), "ttttss"),
        (TimeUp(7), "ttttsss"),  # within an epoch
        (_early_stopping("student_loss"), "ttttssss"),
    ],
    ids=["max_time", "max_time within an epoch", "early stopping"],
)
def test_cut_short_in_the_students_phase_the_model_is_finished(
    callback: Callback, phases: str, quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_dhkd(train_steps=10 if isinstance(callback, EarlyStopping) else 8)
    if isinstance(callback, EarlyStopping):
        phases = "tttttsss"
    engine, recorder = fit(quickstart, tmp_path, model, callbacks=[callback])
    assert recorder.phases == phases
    assert recorder.validations == [len(phases)]
    _assert_finished(engine, model)
    assert f"Training was cut short after step {len(phases)} of " in caplog.text
    assert "in the student's phase. The model is finished with the weights of that step." in caplog.text


@pytest.mark.parametrize(
    ("callback", "step"),
    [(TimeUp(3), 3), (_early_stopping("teacher_loss"), 4)],
    ids=["max_time", "early stopping"],
)
def test_cut_short_in_the_teachers_phase_is_an_error_and_can_be_resumed(
    callback: Callback, step: int, quickstart: Quickstart, tmp_path: Path
) -> None:
    message = (
        rf"after step {step} of 12, in the teacher's phase: the student is untrained.*--ckpt_path .*unfinished.ckpt"
    )
    with pytest.raises(UnfinishedError, match=message):
        fit(quickstart, tmp_path / "cut", small_dhkd(train_steps=12), callbacks=[callback])
    (saved,) = (tmp_path / "cut").rglob("*.ckpt")
    step = torch.load(saved, weights_only=True)["global_step"]
    with pytest.raises(UnfinishedError, match=rf"unfinished training \(step {step} of 12\).*--ckpt_path finishes"):
        Dhkd.load_from_checkpoint(saved)
    model = small_dhkd(train_steps=12)
    engine, recorder = fit(quickstart, tmp_path / "resumed", model, ckpt_path=saved)
    assert recorder.phases == "ttttttssssss"[step:]
    _assert_finished(engine, model)


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), RuntimeError("disk on fire")], ids=["Ctrl-C", "error"])
def test_an_interrupted_run_says_what_it_leaves_behind(
    exception: BaseException, quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = quickstart.num_workers
    with pytest.raises((SystemExit, RuntimeError)):
        fit(quickstart, tmp_path / "cut", small_dhkd(train_steps=8), callbacks=[Raise(5, exception)])
    (saved,) = (tmp_path / "cut").rglob("*.ckpt")
    assert (
        f"Training ended after step 5 of 8, in the student's phase, without a finished model "
        f"({type(exception).__name__}). `--ckpt_path {saved}` resumes it from step 4."
    ) in caplog.text
    # The data module has its images back.
    assert quickstart.train_data[0].image.shape == (3, 64, 64)
    assert quickstart.num_workers == images
    model = small_dhkd(train_steps=8)
    engine, recorder = fit(quickstart, tmp_path / "resumed", model, ckpt_path=saved)
    assert recorder.phases == "ssss"
    _assert_finished(engine, model)


def _checkpoints(folder: Path) -> list[Callback]:
    """Return callbacks that save after every step and after every epoch, the ways in which users do."""
    return [
        ModelCheckpoint(folder, "step-{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(folder, "epoch-{step}", every_n_epochs=1, save_top_k=-1, auto_insert_metric_name=False),
    ]


@pytest.mark.parametrize("cache_limit", [2.0, None])
def test_all_follows_from_the_seed(quickstart: Quickstart, tmp_path: Path, cache_limit: float | None) -> None:
    models = []
    for name, (others, workers, seed) in enumerate([(1, 0, 3), (2, 2, 3), (1, 0, 4)]):
        torch.manual_seed(others)
        quickstart.num_workers = workers
        models.append(small_dhkd(train_steps=4, seed=seed, cache_limit=cache_limit))
        fit(quickstart, tmp_path / str(name), models[-1])
    if cache_limit is not None:  # else worker processes draw the order before the training begins
        assert_same(models[1], models[0])
    assert models[2].post_processor.image_threshold != models[0].post_processor.image_threshold


@pytest.mark.parametrize(("limit", "cache_limit"), [({}, 2.0), ({}, None), ({"max_steps": 7}, 2.0)])
def test_resumed_run_lands_in_the_right_phase(
    quickstart: Quickstart, tmp_path: Path, limit: dict[str, int], cache_limit: float | None
) -> None:
    model = small_dhkd(train_steps=8, cache_limit=cache_limit)
    engine, _ = fit(quickstart, tmp_path, model, callbacks=_checkpoints(tmp_path / "saved"), **limit)
    steps = engine.trainer.global_step
    statistics = {key: value for key, value in model.state_dict().items() if "features.statistics" in key}
    assert statistics
    saved = sorted((tmp_path / "saved").glob("*-?.ckpt"))
    assert {int(path.stem[-1]) for path in saved} == set(range(1, steps + 1))

    for path in saved:
        stop = int(path.stem.split("-")[1])
        resumed = small_dhkd(train_steps=8, cache_limit=cache_limit)
        if path.stem == "step-7" and limit:
            # Saved after the last step and before its calibration; Lightning trains nothing, and tells nobody.
            with pytest.raises(UnfinishedError, match=r"No step was trained \(.*max_steps=7.*7 steps done before"):
                fit(quickstart, tmp_path, resumed, ckpt_path=path, **limit)
            continue
        engine, recorder = fit(quickstart, tmp_path, resumed, ckpt_path=path, **limit)
        assert recorder.phases == "ttttssss"[stop:steps], path.name
        assert engine.trainer.global_step == steps
        assert resumed.finished
        assert (resumed.model.anomaly_map_generator.log_mean != 0).all()
        # The teacher was trained on these statistics: a resumed run must keep them.
        assert all(torch.equal(resumed.state_dict()[key], value) for key, value in statistics.items())
        if stop % 2 == 0:  # at the end of an epoch: as if nothing had happened
            assert_same(resumed, model)


def test_resumed_with_another_budget_is_said(
    quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnfinishedError):
        fit(quickstart, tmp_path / "cut", small_dhkd(train_steps=8), callbacks=[TimeUp(2)])
    (saved,) = (tmp_path / "cut").rglob("*.ckpt")
    model = small_dhkd(train_steps=12)
    engine, recorder = fit(quickstart, tmp_path / "resumed", model, ckpt_path=saved)
    assert "Resumed with 6 steps of the teacher and 6 of the student, begun with 4 and 4" in caplog.text
    assert recorder.phases == "ttttssssss"
    _assert_finished(engine, model)


def test_an_error_before_the_first_step_is_not_said_to_end_a_training(
    quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="needs at least 2"):
        fit(quickstart, tmp_path, small_dhkd(), max_steps=1)
    assert "Training ended" not in caplog.text


def test_stopped_right_after_a_validation_the_checkpoint_is_finished(quickstart: Quickstart, tmp_path: Path) -> None:
    """Early stopping ends the run after the epoch whose validation has saved it as unfinished."""
    model = small_dhkd(train_steps=20)
    stop = _early_stopping("student_loss")
    engine, recorder = fit(quickstart, tmp_path, model, callbacks=[stop], check_val_every_n_epoch=2)
    assert recorder.validations == [4, 8, 12, 16]
    _assert_finished(engine, model)


def test_train_tests_the_finished_model_and_not_what_it_was_resumed_from(
    quickstart: Quickstart, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="disk on fire"):
        fit(quickstart, tmp_path / "cut", small_dhkd(train_steps=8), callbacks=[Raise(7, RuntimeError("disk on fire"))])
    (saved,) = (tmp_path / "cut").rglob("*.ckpt")
    engine = Engine(default_root_dir=tmp_path / "resumed", enable_progress_bar=False)
    model = small_dhkd(train_steps=8)
    (tested,) = engine.train(model=model, datamodule=quickstart, ckpt_path=saved)
    _assert_finished(engine, model)
    (again,) = Engine(default_root_dir=tmp_path / "again", enable_progress_bar=False).test(
        model=small_dhkd(), datamodule=quickstart, ckpt_path=engine.best_model_path
    )
    assert tested == again


def test_train_tests_the_model_that_goes_on_from_a_finished_one(
    quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run that was cut short has left a finished model, which a longer one goes on from."""
    cut, _ = fit(quickstart, tmp_path / "cut", small_dhkd(train_steps=12), callbacks=[TimeUp(8)])
    old = Path(cut.best_model_path).read_bytes()
    engine = Engine(default_root_dir=tmp_path / "resumed", enable_progress_bar=False)
    model = small_dhkd(train_steps=12)
    (tested,) = engine.train(model=model, datamodule=quickstart, ckpt_path=cut.best_model_path)
    assert "Using the model as it was trained, not the checkpoint that it was resumed from." in caplog.text
    assert engine.trainer.global_step == 12
    _assert_finished(engine, model)
    assert Path(engine.best_model_path).is_relative_to(tmp_path / "resumed")
    assert Path(cut.best_model_path).read_bytes() == old
    (again,) = Engine(default_root_dir=tmp_path / "again", enable_progress_bar=False).test(
        model=small_dhkd(), datamodule=quickstart, ckpt_path=engine.best_model_path
    )
    assert tested == again


def test_a_trained_model_can_be_tested_with_another_checkpoint(quickstart: Quickstart, tmp_path: Path) -> None:
    other = small_dhkd(train_steps=2)
    checkpoint = fit(quickstart, tmp_path / "other", other)[0].best_model_path
    model = small_dhkd(train_steps=2)
    engine, _ = fit(quickstart, tmp_path / "model", model)
    engine.test(model=model, datamodule=quickstart, ckpt_path=checkpoint, verbose=False)
    for name, value in other.model.state_dict().items():
        torch.testing.assert_close(model.model.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_validation_in_between_sees_a_calibrated_model(quickstart: Quickstart, tmp_path: Path) -> None:
    class Calibration(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, float]] = []

        def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            mean = pl_module.model.anomaly_map_generator.log_mean[0].item()
            self.seen.append((trainer.global_step, pl_module.calibrated_step, mean))

    calibration = Calibration()
    model = small_dhkd(train_steps=10)
    engine, recorder = fit(quickstart, tmp_path, model, callbacks=[calibration], check_val_every_n_epoch=2)
    assert recorder.validations == [4, 8, 10]
    assert [(step, calibrated) for step, calibrated, _ in calibration.seen] == [(4, 4), (8, 8), (10, 10)]
    assert len({mean for *_, mean in calibration.seen}) == 3
    _assert_finished(engine, model)


@pytest.mark.parametrize("bad", ["loss", "weights"])
def test_what_is_not_finite_stops_the_training_and_spoils_no_checkpoint(
    bad: str, quickstart: Quickstart, tmp_path: Path
) -> None:
    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5 and bad == "loss":
                batch.features[0].fill_(float("nan"))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 6 and bad == "weights":
                next(pl_module.model.students.parameters()).grad.fill_(float("nan"))

    step = {"loss": 5, "weights": 7}[bad]
    message = rf"Not all of the {bad} are finite after step {step} of 8, in the student's phase.*resumes it from step"
    with pytest.raises(UnfinishedError, match=message):
        fit(quickstart, tmp_path, small_dhkd(train_steps=8), callbacks=[Spoil()])
    (saved,) = tmp_path.rglob("*.ckpt")
    assert all(value.isfinite().all() for name, value in torch.load(saved)["state_dict"].items() if "students" in name)


def test_an_engine_trains_once(quickstart: Quickstart, tmp_path: Path) -> None:
    engine, _ = fit(quickstart, tmp_path, small_dhkd(train_steps=2))
    with pytest.raises(UnfinishedError, match="An Engine trains once"):
        engine.fit(model=small_dhkd(train_steps=2), datamodule=quickstart)


def test_a_model_can_be_trained_again(quickstart: Quickstart, tmp_path: Path) -> None:
    model = small_dhkd(train_steps=4)
    fit(quickstart, tmp_path, model)
    engine, recorder = fit(quickstart, tmp_path, model)
    assert recorder.phases == "ttss"
    _assert_finished(engine, model)


def test_an_untrained_model_is_tested_with_a_warning(
    quickstart: Quickstart, trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained.engine.test(model=trained.model, datamodule=quickstart)
    assert "scores mean nothing" not in caplog.text
    Engine(default_root_dir=tmp_path, enable_progress_bar=False).test(model=small_dhkd(), datamodule=quickstart)
    assert "This model isn't trained to its end; its scores mean nothing." in caplog.text
