# SPDX-License-Identifier: Apache-2.0

"""A checkpoint brings arguments, weights and pre-processor along, and what contradicts it is named."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from anomalib.data.transforms import SquarePad
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from anomalib_dhkd import Dhkd, Quickstart, RankPreservingPostProcessor
from anomalib_dhkd.checkpoint import KEY, check_placement, check_restorable
from tests.helpers import SMALL, Trained, assert_same, fit, small_dhkd


class Inverting(PreProcessor):
    """A pre-processor that does more than its transform."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return super().forward(1 - batch)


class Scores(Dataset):
    """Scores of random images, by the model itself."""

    def __init__(self, model: Dhkd) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    @torch.no_grad()
    def __getitem__(self, index: int) -> torch.Tensor:
        return self.model(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(index))).pred_score


def _engine(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, enable_progress_bar=False)


def _changed(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Return a copy of a checkpoint with a change."""
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, folder / "changed.ckpt")
    return folder / "changed.ckpt"


@pytest.mark.parametrize("method", ["predict", "test", "validate"])
def test_a_model_with_defaults_becomes_the_checkpoints(method: str, trained: Trained) -> None:
    engine, restored, datamodule, checkpoint = trained
    model = Dhkd()
    getattr(engine, method)(model=model, datamodule=datamodule, ckpt_path=checkpoint)
    assert model.hparams["width"] == 8
    assert model.model.anomaly_map_generator.image_score == restored.model.anomaly_map_generator.image_score
    assert_same(model, restored)
    if method == "predict":
        scores = [batch.pred_score for batch in engine.predict(model=restored, datamodule=datamodule)]
        again = [
            batch.pred_score for batch in engine.predict(model=Dhkd(), datamodule=datamodule, ckpt_path=checkpoint)
        ]
        torch.testing.assert_close(torch.cat(again), torch.cat(scores), rtol=0, atol=0)


def test_an_argument_that_contradicts_the_checkpoint_is_named_in_a_line(trained: Trained) -> None:
    engine, _, datamodule, checkpoint = trained
    model = Dhkd(width=16, image_score="max", layers=["blocks.2", "blocks.4"], train_steps=7)
    with pytest.raises(ValueError, match="width") as error:
        engine.predict(model=model, datamodule=datamodule, ckpt_path=checkpoint)
    assert str(error.value) == (
        "width must be 8, as in the checkpoint, got 16; image_score must be 'contrast', as in the checkpoint, got "
        "'max'; what isn't given is taken from the checkpoint."
    )
    with pytest.raises(ValueError, match=r"^width must be 8, as in the checkpoint, got 16\.$"):
        Dhkd.load_from_checkpoint(checkpoint, width=16)
    assert Dhkd.load_from_checkpoint(checkpoint, train_steps=30).hparams["train_steps"] == 30


@pytest.mark.parametrize(("arguments", "given"), [({}, 64), (SMALL | {"width": 16}, 16)])
def test_a_training_is_resumed_with_its_own_arguments_alone(
    arguments: dict[str, Any], given: int, trained: Trained, quickstart: Quickstart
) -> None:
    with pytest.raises(ValueError, match=rf"^width must be 8, as in the checkpoint, got {given}"):
        trained.engine.fit(Dhkd(**arguments, train_steps=40), datamodule=quickstart, ckpt_path=trained.checkpoint)


@pytest.mark.parametrize("post_processor", [True, RankPreservingPostProcessor(image_sensitivity=0.3)])
def test_a_post_processor_can_not_be_added(
    post_processor: bool | RankPreservingPostProcessor, quickstart: Quickstart, tmp_path: Path
) -> None:
    fitted, _ = fit(quickstart, tmp_path, small_dhkd(train_steps=2, post_processor=False))
    where = {"datamodule": quickstart, "ckpt_path": fitted.best_model_path}
    with pytest.raises(ValueError, match="post_processor must be False, as in the checkpoint, got True"):
        _engine(tmp_path).predict(Dhkd(post_processor=post_processor), **where)
    batches = _engine(tmp_path).predict(Dhkd(post_processor=False), **where)
    assert batches[0].pred_score.isfinite().all()
    assert batches[0].pred_label is None


def test_a_post_processor_can_not_be_taken_away(trained: Trained, quickstart: Quickstart) -> None:
    with pytest.raises(ValueError, match="post_processor must be True, as in the checkpoint, got False"):
        trained.engine.predict(Dhkd(post_processor=False), datamodule=quickstart, ckpt_path=trained.checkpoint)


def test_one_model_can_take_one_checkpoint_after_another(
    trained: Trained, quickstart: Quickstart, tmp_path: Path
) -> None:
    other = small_dhkd(width=12, train_steps=2, post_processor=PostProcessor(image_sensitivity=0.3))
    fitted, _ = fit(quickstart, tmp_path / "other", other)
    model = Dhkd(post_processor=PostProcessor())
    for checkpoint, width, sensitivity, size in (
        (fitted.best_model_path, 12, 0.3, 64),
        (trained.checkpoint, 8, 0.5, 320),
        (fitted.best_model_path, 12, 0.3, 64),
    ):
        _engine(tmp_path).test(model=model, datamodule=quickstart, ckpt_path=checkpoint, verbose=False)
        assert model.hparams["width"] == width
        assert model.post_processor.image_sensitivity == sensitivity
        assert model.input_size == (size, size)


def test_a_checkpoint_from_before_the_arguments_had_their_place_is_read(trained: Trained, tmp_path: Path) -> None:
    checkpoint = _changed(trained.checkpoint, tmp_path, lambda content: content.pop(KEY))
    assert_same(Dhkd.load_from_checkpoint(checkpoint), trained.model)
    model = Dhkd()
    trained.engine.test(model=model, datamodule=trained.datamodule, ckpt_path=checkpoint, verbose=False)
    assert_same(model, trained.model)


def test_metrics_of_the_training_are_no_conflict(quickstart: Quickstart, tmp_path: Path) -> None:
    evaluator = Evaluator(test_metrics=[AUPRO(fields=["anomaly_map", "gt_mask"])])
    model = small_dhkd(train_steps=2, evaluator=evaluator)
    engine, _ = fit(quickstart, tmp_path, model)
    assert_same(Dhkd.load_from_checkpoint(engine.best_model_path).model, model.model)


def test_weights_come_from_the_checkpoint(quickstart: Quickstart, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    torch.save(timm.create_model("resnet18", pretrained=False).state_dict(), weights)
    backbone = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "weights": weights}
    model = small_dhkd(**backbone, train_steps=2)
    engine, _ = fit(quickstart, tmp_path, model)
    weights.unlink()
    restored = Dhkd.load_from_checkpoint(engine.best_model_path)
    assert_same(restored, model)
    predicting = Dhkd()
    _engine(tmp_path).test(model=predicting, datamodule=quickstart, ckpt_path=engine.best_model_path, verbose=False)
    assert_same(predicting, model)
    assert torch.equal(predicting.model.features.image_mean, model.model.features.image_mean)
    # Neither does a model that was made with the same arguments need them, nor one that is trained anew.
    predicting = small_dhkd(**backbone)
    _engine(tmp_path).test(model=predicting, datamodule=quickstart, ckpt_path=engine.best_model_path, verbose=False)
    assert_same(predicting, model)
    fit(quickstart, tmp_path / "anew", restored)
    assert torch.equal(restored.model.features.backbone.conv1.weight, model.model.features.backbone.conv1.weight)
    with pytest.raises(FileNotFoundError, match="weights must be a file"):
        fit(quickstart, tmp_path / "missing", small_dhkd(**backbone))


@pytest.mark.parametrize(
    ("post_processor", "expected"),
    [
        (True, (0.3, 0.5, None)),
        (PostProcessor(image_sensitivity=0.4, pixel_sensitivity=0.6), (0.4, 0.6, None)),
        (RankPreservingPostProcessor(image_sensitivity=0.4), (0.4, 0.5, None)),
        (RankPreservingPostProcessor(false_alarm_rate=0.5), (0.3, 0.5, 0.5)),
    ],
)
def test_settings_given_at_prediction_win(
    post_processor: Any, expected: tuple[float, float, float | None], trained: Trained, tmp_path: Path
) -> None:
    def set_sensitivity(content: dict[str, Any]) -> None:
        content["anomalib_post_processor_config"] |= {
            "image_sensitivity": 0.3,
            "normal_image_scores": [0.0, 1.0],
            "normal_pixel_scores": [0.0, 1.0],
        }

    checkpoint = _changed(trained.checkpoint, tmp_path, set_sensitivity)
    model = Dhkd(post_processor=post_processor)
    batches = trained.engine.predict(model=model, datamodule=trained.datamodule, ckpt_path=checkpoint)
    loaded = Dhkd.load_from_checkpoint(checkpoint, post_processor=post_processor)
    for one in (model.post_processor, loaded.post_processor):
        found = one.image_sensitivity, one.pixel_sensitivity, getattr(one, "false_alarm_rate", None)
        assert found == expected
    for batch in batches:
        assert torch.equal(batch.pred_label.flatten(), batch.pred_score.flatten() > 1 - expected[0])
    # What is changed on a model counts as given, too.
    model.post_processor.image_sensitivity = 0.9
    trained.engine.predict(model=model, datamodule=trained.datamodule, ckpt_path=checkpoint)
    assert model.post_processor.image_sensitivity == 0.9


def test_the_trained_transform_is_restored(quickstart: Quickstart, tmp_path: Path) -> None:
    transform = v2.Compose([v2.Resize((64, 96)), v2.Grayscale(3)])
    engine, _ = fit(quickstart, tmp_path, small_dhkd(train_steps=2, pre_processor=PreProcessor(transform)))
    model = Dhkd()
    _engine(tmp_path).test(model=model, datamodule=quickstart, ckpt_path=engine.best_model_path, verbose=False)
    image = torch.rand(1, 3, 80, 80)
    for one in (model, Dhkd.load_from_checkpoint(engine.best_model_path, pre_processor=PreProcessor())):
        torch.testing.assert_close(one.pre_processor.transform(image), transform(image))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.GaussianBlur(3), "be one that a checkpoint can hold.* got GaussianBlur"),
        (v2.Compose([v2.Resize((64, 64)), v2.RandomHorizontalFlip()]), "be one that a checkpoint can hold"),
        (v2.Compose([v2.Resize((80, 80)), v2.CenterCrop(64)]), r"not crop, .* CenterCrop\(size=\[64, 64\]"),
        (v2.CenterCrop(200), "not crop"),
        (v2.Compose([SquarePad(), v2.Resize((64, 64))]), "not crop, pad"),
    ],
)
def test_a_transform_that_would_be_lost_or_displaces_maps_is_refused_before_training(
    transform: v2.Transform, message: str, quickstart: Quickstart, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^The transform of pre_processor must {message}"):
        fit(quickstart, tmp_path, small_dhkd(pre_processor=PreProcessor(transform)))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    "transform",
    [
        None,
        v2.Resize((64, 96)),
        v2.Resize(64),
        v2.Resize((64, 64), interpolation=v2.InterpolationMode.BICUBIC, antialias=False),
        v2.Compose([v2.Resize((300, 200)), v2.Resize((97, 128)), v2.Grayscale(3), v2.Normalize([0.1], [0.9])]),
    ],
)
def test_other_transforms_pass(transform: v2.Transform | None) -> None:
    check_restorable(PreProcessor(transform))
    check_placement(PreProcessor(transform))


def test_a_pre_processor_that_contradicts_the_checkpoint_is_named(trained: Trained, quickstart: Quickstart) -> None:
    message = r"^the transform of pre_processor must be Resize\(size=\[320, 320\].* got Resize\(size=\[64, 64\].*\)"
    with pytest.raises(ValueError, match=message):
        trained.engine.predict(model=small_dhkd(), datamodule=quickstart, ckpt_path=trained.checkpoint)
    with pytest.raises(ValueError, match=message):
        trained.engine.fit(model=small_dhkd(), datamodule=quickstart, ckpt_path=trained.checkpoint)
    with pytest.raises(ValueError, match=message):
        Dhkd.load_from_checkpoint(trained.checkpoint, pre_processor=Dhkd.configure_pre_processor((64, 64)))


def test_a_pre_processor_of_another_class_is_named(quickstart: Quickstart, tmp_path: Path) -> None:
    engine, _ = fit(quickstart, tmp_path, small_dhkd(train_steps=2, pre_processor=Inverting(v2.Resize((64, 64)))))
    path = engine.best_model_path
    message = r"pre_processor must be of the checkpoint's class .*\.Inverting, which isn't restored, got .*PreProcessor"
    with pytest.raises(ValueError, match=message):
        Dhkd.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=message):
        _engine(tmp_path).test(model=Dhkd(), datamodule=quickstart, ckpt_path=path)
    restored = Dhkd.load_from_checkpoint(path, pre_processor=Inverting())
    assert restored.input_size == (64, 64)


def test_no_pre_processor(quickstart: Quickstart, tmp_path: Path) -> None:
    engine, _ = fit(quickstart, tmp_path, small_dhkd(train_steps=2, pre_processor=False))
    assert Dhkd.load_from_checkpoint(engine.best_model_path).pre_processor is None
    with pytest.raises(ValueError, match=r"class None, .* got anomalib_dhkd.*PreProcessor"):
        _engine(tmp_path).test(model=Dhkd(), datamodule=quickstart, ckpt_path=engine.best_model_path)


def test_a_trained_model_can_be_pickled_and_works_in_a_spawned_worker(quickstart: Quickstart, tmp_path: Path) -> None:
    model = small_dhkd(train_steps=2)
    fit(quickstart, tmp_path, model)
    assert_same(pickle.loads(pickle.dumps(model)), model)  # noqa: S301  # our own
    scores = Scores(model.eval().share_memory())
    loader = DataLoader(scores, num_workers=1, multiprocessing_context="spawn")
    for found, expected in zip(loader, scores, strict=False):
        torch.testing.assert_close(found[0], expected)
