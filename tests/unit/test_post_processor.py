# SPDX-License-Identifier: Apache-2.0

"""Tests of the normalisation and the false-alarm threshold."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.engine import Engine
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from anomalib_dhkd import Dhkd, Quickstart, RankPreservingPostProcessor
from tests.helpers import fit, small_dhkd

NAN = float("nan")
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
scores = arrays(np.float32, st.integers(1, 50), elements=finite)


def normalise(preds: np.ndarray | torch.Tensor, low: float, high: float, threshold: float) -> torch.Tensor:
    """Normalise image scores with the given statistics."""
    post_processor = RankPreservingPostProcessor()
    statistics = {"image_min": low, "image_max": high, "_image_threshold": threshold}
    state = {name: torch.tensor(value, dtype=torch.float32) for name, value in statistics.items()}
    post_processor.load_state_dict(state, strict=False)
    return post_processor(InferenceBatch(pred_score=torch.as_tensor(preds))).pred_score


@given(scores, finite, finite, st.one_of(finite, st.just(NAN)))
@example(np.array([-3.4e38, 0, 3.4e38], np.float32), -3.4e38, 3.4e38, 0.0)
@example(np.array([1e-45, 2e-45], np.float32), 0.0, 1e-45, 0.0)
def test_stays_in_range_and_never_reverses_an_order(
    preds: np.ndarray, first: float, second: float, threshold: float
) -> None:
    normalised = normalise(np.sort(preds), min(first, second), max(first, second), threshold)
    assert normalised.dtype == torch.float32
    assert ((normalised >= 0) & (normalised <= 1)).all()
    assert (normalised.diff() >= 0).all()


@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(-25, 100),
    st.floats(0, 1),
    st.lists(st.floats(-10, 11), min_size=2, max_size=20),
)
def test_scores_a_thousandth_of_the_range_apart_stay_apart(
    offset: float, exponent: float, share: float, positions: list[float]
) -> None:
    """From ten ranges below the smallest validation score to ten above the largest, at scales from 1e-8 to 1e30."""
    size = np.float32(2.0**exponent)
    low = np.float32(offset) * size if abs(offset) < 100 else np.float32(offset)
    high = np.float32(low + size)
    size = high - low
    # A thousandth of the range must be more than float32's own resolution of the scores.
    assume(np.isfinite(size) and size / 1000 > 4 * np.spacing(np.float32(max(abs(low), abs(high)) + 11 * size)))
    preds = np.float32(low + size * np.array(positions))
    normalised = normalise(preds, float(low), float(high), float(np.float32(low + size * share))).numpy()
    apart = np.subtract.outer(preds.astype(np.float64), preds.astype(np.float64)) >= float(size) / 1000
    assert (np.subtract.outer(normalised, normalised)[apart] > 0).all()


def test_every_thousandth_of_the_range_is_a_value_of_its_own() -> None:
    """All 21,000 steps at once, for thresholds within the range, at its ends and far outside of it."""
    for threshold in (-2, -1.999, 1.5, 4.999, 5, 30, -25):
        preds = torch.linspace(-72, 75, 21_001, dtype=torch.float64).float()
        assert (normalise(preds, -2, 5, threshold).diff() > 0).all(), threshold


@given(finite, finite, finite)
def test_threshold_becomes_one_half(first: float, second: float, threshold: float) -> None:
    preds = np.array([threshold], np.float32)
    assert normalise(preds, min(first, second), max(first, second), threshold) == 0.5


@given(st.floats(-(2.0**90), 2.0**90, width=32), st.floats(2**-60, 2**90, width=32), st.floats(0, 1))
def test_validation_range_lies_between_a_tenth_and_nine_tenths(low: float, size: float, share: float) -> None:
    high = float(np.float32(low) + np.float32(size))
    assume(high > low and high - low > 1e-6 * max(abs(low), abs(high)))
    threshold = float(np.float32(low * (1 - share) + high * share))
    smallest, largest = normalise(np.array([low, high], np.float32), low, high, threshold)
    assert 0.0999 <= smallest <= 0.5 <= largest <= 0.9001


@given(scores, finite)
def test_statistics_that_are_missing_or_infinite_leave_the_scores_alone(preds: np.ndarray, value: float) -> None:
    for low, high in ((NAN, value), (value, NAN), (NAN, NAN), (value, math.inf), (-math.inf, value)):
        assert torch.equal(normalise(preds, low, high, value), torch.as_tensor(preds))


def test_missing_threshold_is_the_middle_of_the_range() -> None:
    assert normalise(np.array([1.5], np.float32), 1, 2, NAN) == 0.5


@given(scores, finite)
def test_equal_minimum_and_maximum(preds: np.ndarray, value: float) -> None:
    normalised = normalise(np.sort(preds), value, value, value)
    assert ((normalised >= 0) & (normalised <= 1)).all()
    assert (normalised.diff() >= 0).all()
    assert normalise(np.array([value], np.float32), value, value, value) == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(scores=st.lists(st.floats(-60_000, 60_000), min_size=1, max_size=50), low=st.floats(-100, 0))
def test_half_precision_keeps_every_difference(dtype: torch.dtype, scores: list[float], low: float) -> None:
    preds = torch.tensor(scores, dtype=dtype).unique()
    normalised = normalise(preds, low, 100, 50)
    assert normalised.dtype == torch.float32
    assert ((normalised >= 0) & (normalised <= 1)).all()
    assert (normalised.diff() >= 0).all()
    near = (preds.abs() <= 1000)[1:] & (preds.float().diff() >= 0.2)
    assert (normalised.diff()[near] > 0).all()


def test_no_map_no_normalised_map() -> None:
    assert RankPreservingPostProcessor()(InferenceBatch(pred_score=torch.zeros(2, 1))).anomaly_map is None


def test_sensitivity_moves_the_label_not_the_score() -> None:
    predictions = InferenceBatch(pred_score=torch.tensor([[0.5], [1.5]]), anomaly_map=torch.tensor([[[[0.5, 1.5]]]]))
    labels = {}
    for sensitivity in (0.1, 0.5, 0.9):
        post_processor = RankPreservingPostProcessor(image_sensitivity=sensitivity, pixel_sensitivity=sensitivity)
        statistics = {"min": 0.0, "max": 2.0}
        state = {f"{level}_{name}": torch.tensor(v) for level in ("image", "pixel") for name, v in statistics.items()}
        state |= {"_image_threshold": torch.tensor(1.0), "_pixel_threshold": torch.tensor(1.0)}
        post_processor.load_state_dict(state)
        output = post_processor(predictions)
        torch.testing.assert_close(output.pred_score, torch.tensor([[0.25], [0.75]]))
        assert output.pred_mask.flatten().tolist() == output.pred_label.flatten().tolist()
        labels[sensitivity] = output.pred_label.flatten().tolist()
    assert labels == {0.1: [False, False], 0.5: [False, True], 0.9: [True, True]}


def _validate(scores: list[float], labels: list[int]) -> RankPreservingPostProcessor:
    post_processor = RankPreservingPostProcessor()
    for part in (slice(0, 2), slice(2, None)):
        batch = ImageBatch(
            image=torch.zeros(len(scores[part]), 3, 8, 8),
            pred_score=torch.tensor(scores[part]),
            gt_label=torch.tensor(labels[part]),
        )
        post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    return post_processor


@pytest.mark.parametrize(
    ("scores", "labels", "threshold"),
    [
        ([1.0, 5.0, 2.0, 7.0], [0, 1, 0, 1], 3.5),
        ([5.0, 1.0, 7.0, 2.0, 3.0], [1, 0, 1, 1, 0], 1.5),  # F1 is 0.86 above 1 and 0.8 above 3
        ([1.0, 2.0, 4.0], [0, 0, 0], 4.0),
        ([1.0, 2.0, 4.0], [1, 1, 1], 1.0),
        ([4.0, 4.0, 4.0], [0, 1, 1], 4.0),
    ],
)
def test_the_threshold_lies_halfway(scores: list[float], labels: list[int], threshold: float) -> None:
    post_processor = _validate(scores, labels)
    assert post_processor.image_threshold == threshold
    predicted = post_processor(InferenceBatch(pred_score=torch.tensor(scores))).pred_label
    assert predicted.tolist() == [score > threshold for score in scores]


# False-alarm threshold


@pytest.mark.parametrize("rate", [0, 1, -0.1, 5, NAN])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="false_alarm_rate must be above 0 and below 1, or None, got"):
        RankPreservingPostProcessor(false_alarm_rate=rate)


@pytest.mark.parametrize(("rate", "count"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.07, 14), (0.3, 3)])
def test_number_of_images_that_a_rate_needs(rate: float, count: int) -> None:
    post_processor = RankPreservingPostProcessor(false_alarm_rate=rate)
    post_processor.normal_image_scores = [float(score) for score in range(count)]
    assert post_processor.image_threshold == count - 1
    post_processor.normal_image_scores.pop()
    with pytest.raises(ValueError, match=f"needs at least {count} good validation images, got {count - 1}"):
        _ = post_processor.image_threshold


@pytest.mark.parametrize(("rate", "count"), [(0.01, 250), (0.05, 50), (0.1, 64)])
def test_false_alarms_among_new_good_images_are_as_many_as_asked_for(rate: float, count: int) -> None:
    """Skewed scores, 2,000 draws: the mean rate lies between the rate and 1 / (n + 1) below it."""
    draws, rates = 2000, []
    drawn = torch.randn(draws, count).exp()
    new = torch.randn(draws, 1000).exp()
    post_processor = RankPreservingPostProcessor(false_alarm_rate=rate)
    for seen, unseen in zip(drawn, new, strict=True):
        post_processor.normal_image_scores = seen.sort().values.tolist()
        rates.append((unseen > post_processor.image_threshold).float().mean())
    rates = torch.stack(rates)
    error = 4 * rates.std() / math.sqrt(draws)
    assert rate - 1 / (count + 1) - error <= rates.mean() <= rate + error


def _fit(datamodule: Quickstart, folder: Path, **arguments: float) -> tuple[Engine, Dhkd]:
    model = small_dhkd(train_steps=2, post_processor=RankPreservingPostProcessor(**arguments))
    engine, _ = fit(datamodule, folder, model)
    return engine, model


def test_threshold_comes_from_held_out_training_images_alone(held_out_quickstart: Quickstart, tmp_path: Path) -> None:
    engine, model = _fit(held_out_quickstart, tmp_path, false_alarm_rate=0.3)
    held_out = held_out_quickstart.val_data
    assert len(held_out) == 4
    assert (held_out.samples.split == "train").all()
    assert not set(held_out.samples.image_path) & set(held_out_quickstart.train_data.samples.image_path)

    batch = held_out.collate_fn(list(held_out))
    with torch.no_grad():
        raw = model.eval().model(model.pre_processor(batch.image))
    expected = raw.pred_score.flatten().sort().values
    assert model.post_processor.normal_image_scores == pytest.approx(expected.tolist(), rel=1e-4)
    # ceil(5 x 0.7) = 4: the highest of four.
    torch.testing.assert_close(model.post_processor.image_threshold, expected[3])
    torch.testing.assert_close(model.post_processor.pixel_threshold, raw.anomaly_map.max())

    restored = Dhkd.load_from_checkpoint(engine.best_model_path).post_processor
    assert restored.false_alarm_rate == 0.3
    assert restored.image_threshold == model.post_processor.image_threshold
    restored.false_alarm_rate = 0.5  # ceil(5 x 0.5) = 3
    torch.testing.assert_close(restored.image_threshold, expected[2])
    restored.false_alarm_rate = None
    assert restored.image_threshold == restored.state_dict()["_image_threshold"]

    predictions = engine.predict(model=model, dataset=held_out)
    assert not torch.cat([batch.pred_label for batch in predictions]).any()


def test_test_images_cannot_set_the_false_alarm_threshold(quickstart: Quickstart, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_split_mode='same_as_test'"):
        _fit(quickstart, tmp_path, false_alarm_rate=0.3)
    engine, model = _fit(quickstart, tmp_path)
    assert model.post_processor.normal_image_scores == []
    good = model.post_processor.good_image_scores  # no threshold comes from these
    assert len(good) == 2
    assert Dhkd.load_from_checkpoint(engine.best_model_path).post_processor.good_image_scores == good


def test_a_batch_without_good_images() -> None:
    post_processor = RankPreservingPostProcessor()
    for scores, labels in (([1.0, 2.0], [1, 1]), ([4.0, 3.0], [0, 0])):
        maps = torch.tensor(scores)[:, None, None].expand(2, 8, 8)
        batch = ImageBatch(
            image=torch.zeros(2, 3, 8, 8),
            pred_score=torch.tensor(scores),
            anomaly_map=maps,
            gt_label=torch.tensor(labels),
        )
        post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    assert post_processor.normal_image_scores == post_processor.normal_pixel_scores == [3, 4]
    post_processor.on_validation_batch_end(None, None, batch.update(gt_label=torch.tensor([1, 1])))
    post_processor.on_validation_epoch_end(None, None)
    assert post_processor.normal_image_scores == [3, 4]


def test_too_few_good_images_are_refused_before_training(quickstart_root: Path, tmp_path: Path) -> None:
    datamodule = Quickstart(
        root=quickstart_root, num_train=8, num_test=2, num_workers=0, val_split_mode="from_train", val_split_ratio=0.5
    )
    with pytest.raises(ValueError, match="needs at least 9 good validation images, got 4"):
        _fit(datamodule, tmp_path, false_alarm_rate=0.1)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_models_without_anomaly_maps() -> None:
    post_processor = RankPreservingPostProcessor(false_alarm_rate=0.3)
    batch = ImageBatch(image=torch.zeros(4, 3, 8, 8), pred_score=torch.arange(4.0), gt_label=torch.tensor([0, 0, 1, 0]))
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    assert post_processor.normal_image_scores == [0, 1, 3]
    assert post_processor.image_threshold == 3


def test_one_good_validation_image() -> None:
    post_processor = RankPreservingPostProcessor(false_alarm_rate=0.5)
    batch = ImageBatch(
        image=torch.zeros(1, 3, 8, 8),
        pred_score=torch.tensor([2.0]),
        anomaly_map=torch.full((1, 8, 8), 3.0),
        gt_label=torch.tensor([0]),
    )
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    assert post_processor.normal_image_scores == [2]
    assert post_processor.normal_pixel_scores == [3]
    assert post_processor.image_threshold == 2
    post_processor.false_alarm_rate = 0.4
    with pytest.raises(ValueError, match="needs at least 2 good validation images, got 1"):
        _ = post_processor.image_threshold
