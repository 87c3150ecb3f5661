# SPDX-License-Identifier: Apache-2.0

"""Calibration, fusion and image score."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_dhkd.anomaly_map import AnomalyMapGenerator, resize


def _distances(batch: int, scale: tuple[float, float] = (1.0, 1.0)) -> list[torch.Tensor]:
    return [scale[0] * torch.rand(batch, 1, 8, 8) + 0.01, scale[1] * torch.rand(batch, 1, 4, 4) + 0.01]


def test_calibrated_scales_have_mean_zero_and_variance_one_on_training_images() -> None:
    generator = AnomalyMapGenerator([1, 1], calibration=True, image_score="mean")
    distances = [_distances(50)[0] ** 3, 1000 * torch.rand(50, 1, 8, 8) + 0.01]
    generator.fit([[d[:30] for d in distances], [d[30:] for d in distances]])
    fused = generator(distances, (8, 8)).anomaly_map
    assert fused.mean().item() == pytest.approx(0, abs=1e-4)
    logs = [d.log() for d in distances]
    torch.testing.assert_close(fused, sum((log - log.mean()) / log.std() for log in logs) / 2, rtol=1e-3, atol=1e-3)


def test_calibration_cancels_the_size_of_a_scale() -> None:
    maps = []
    for factor in (1.0, 1e4):
        generator = AnomalyMapGenerator([1, 1], calibration=True, image_score="topk")
        torch.manual_seed(0)
        train, test = _distances(20), _distances(3)
        generator.fit([[train[0], train[1] * factor]])
        maps.append(generator([test[0], test[1] * factor], (16, 16)).anomaly_map)
    torch.testing.assert_close(maps[0], maps[1], atol=1e-4, rtol=1e-4)


def test_without_calibration_the_map_is_the_plain_mean() -> None:
    generator = AnomalyMapGenerator([1, 1], calibration=False, image_score="max")
    generator.fit([_distances(5)])
    distances = [torch.full((1, 1, 4, 4), 2.0), torch.full((1, 1, 2, 2), 6.0)]
    assert (generator(distances, (8, 8)).anomaly_map == 4.0).all()


def test_weights() -> None:
    generator = AnomalyMapGenerator([1, 3], calibration=False, image_score="max")
    output = generator([torch.full((1, 1, 4, 4), 4.0), torch.full((1, 1, 2, 2), 8.0)], (8, 8))
    assert (output.anomaly_map == 7.0).all()
    assert output.pred_score.item() == 7.0


@pytest.mark.parametrize(
    ("image_score", "expected"), [("mean", 0.045), ("max", 6.0), ("topk", 4.5), ("contrast", 4.4775)]
)
def test_image_score(image_score: str, expected: float) -> None:
    distance = torch.zeros(1, 1, 20, 20)
    distance[0, 0, 3, 4:8] = torch.tensor([3.0, 4.0, 5.0, 6.0])  # a hundredth of 400 positions
    output = AnomalyMapGenerator([1], calibration=False, image_score=image_score)([distance], (20, 20))
    assert output.pred_score.shape == (1, 1)
    assert output.pred_score.item() == pytest.approx(expected)


def test_an_anomaly_raises_map_and_score_where_it_is() -> None:
    generator = AnomalyMapGenerator([1, 1], calibration=True, image_score="topk")
    generator.fit([_distances(20)])
    normal = _distances(1)
    defective = [d.clone() for d in normal]
    defective[0][0, 0, 6, 1], defective[1][0, 0, 3, 0] = 30.0, 30.0
    before, after = generator(normal, (64, 64)), generator(defective, (64, 64))
    assert after.pred_score > before.pred_score
    row, column = divmod(int(after.anomaly_map.argmax()), 64)
    assert 48 <= row < 64
    assert column < 16


def test_zero_distance_stays_finite() -> None:
    generator = AnomalyMapGenerator([1], calibration=True, image_score="topk")
    generator.fit([[torch.zeros(2, 1, 4, 4)]])
    assert generator([torch.zeros(2, 1, 4, 4)], (8, 8)).anomaly_map.isfinite().all()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 48), (9, 5), (3, 4)])
def test_resize_is_interpolation(size: tuple[int, int], mode: str) -> None:
    maps = torch.randn(2, 1, 8, 6)
    torch.testing.assert_close(resize(maps, *size, mode), F.interpolate(maps, size=size, mode=mode))
