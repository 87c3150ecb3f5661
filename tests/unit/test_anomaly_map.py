# SPDX-License-Identifier: Apache-2.0

"""Calibration, fusion and image score."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_dhkd.anomaly_map import AnomalyMapGenerator, resize

HALVES = {"fine": 0.5, "coarse": 0.5}


def _distances(batch: int) -> dict[str, torch.Tensor]:
    return {"fine": torch.rand(batch, 1, 8, 8) + 0.01, "coarse": torch.rand(batch, 1, 4, 4) + 0.01}


def test_calibrated_scales_have_mean_zero_and_variance_one_on_training_images() -> None:
    generator = AnomalyMapGenerator(HALVES, "mean")
    distances = {"fine": _distances(50)["fine"] ** 3, "coarse": 1000 * torch.rand(50, 1, 8, 8) + 0.01}
    generator.fit([{name: d[part] for name, d in distances.items()} for part in (slice(0, 30), slice(30, 50))])
    fused = generator(distances, (8, 8)).anomaly_map
    assert fused.mean().item() == pytest.approx(0, abs=1e-4)
    logs = [d.log() for d in distances.values()]
    torch.testing.assert_close(fused, sum((log - log.mean()) / log.std() for log in logs) / 2, rtol=1e-3, atol=1e-3)


def test_calibration_cancels_the_size_of_a_scale() -> None:
    maps = []
    for factor in (1.0, 1e4):
        generator = AnomalyMapGenerator(HALVES, "topk")
        torch.manual_seed(0)
        train, test = _distances(20), _distances(3)
        generator.fit([train | {"coarse": train["coarse"] * factor}])
        maps.append(generator(test | {"coarse": test["coarse"] * factor}, (16, 16)).anomaly_map)
    torch.testing.assert_close(maps[0], maps[1], atol=1e-4, rtol=1e-4)


def test_weights() -> None:
    """Logarithms of 4 and 8, not calibrated, a quarter and three quarters."""
    generator = AnomalyMapGenerator({"fine": 0.25, "coarse": 0.75}, "max")
    distances = {"coarse": torch.full((1, 1, 2, 2), 8.0), "fine": torch.full((1, 1, 4, 4), 4.0)}
    output = generator(distances, (8, 8))
    expected = 0.25 * math.log(4) + 0.75 * math.log(8)
    torch.testing.assert_close(output.anomaly_map, torch.full((1, 1, 8, 8), expected))
    assert output.pred_score.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("image_score", "expected"), [("mean", 0.045), ("max", 6.0), ("topk", 4.5), ("contrast", 4.485)]
)
def test_image_score(image_score: str, expected: float) -> None:
    logs = torch.zeros(1, 1, 20, 20)
    logs[0, 0, 3, 4:8] = torch.tensor([3.0, 4.0, 5.0, 6.0])  # a hundredth of 400 positions
    output = AnomalyMapGenerator({"only": 1.0}, image_score)({"only": logs.exp()}, (20, 20))
    assert output.pred_score.shape == (1, 1)
    assert output.pred_score.item() == pytest.approx(expected, abs=1e-5)


def test_contrast_gives_nothing_to_images_below_the_average() -> None:
    logs = torch.full((1, 1, 20, 20), -2.0)
    logs[0, 0, 3, 4:8] = 3.0
    output = AnomalyMapGenerator({"only": 1.0}, "contrast")({"only": logs.exp()}, (20, 20))
    assert output.pred_score.item() == pytest.approx(3.0, abs=1e-5)


def test_an_anomaly_raises_map_and_score_where_it_is() -> None:
    generator = AnomalyMapGenerator(HALVES, "topk")
    generator.fit([_distances(20)])
    normal = _distances(1)
    defective = {name: d.clone() for name, d in normal.items()}
    defective["fine"][0, 0, 6, 1], defective["coarse"][0, 0, 3, 0] = 30.0, 30.0
    before, after = generator(normal, (64, 64)), generator(defective, (64, 64))
    assert after.pred_score > before.pred_score
    row, column = divmod(int(after.anomaly_map.argmax()), 64)
    assert 48 <= row < 64
    assert column < 16


def test_zero_distance_stays_finite() -> None:
    generator = AnomalyMapGenerator({"only": 1.0}, "topk")
    generator.fit([{"only": torch.zeros(2, 1, 4, 4)}])
    assert generator({"only": torch.zeros(2, 1, 4, 4)}, (8, 8)).anomaly_map.isfinite().all()


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 48), (9, 5), (3, 4)])
def test_resize_is_interpolation(size: tuple[int, int], mode: str) -> None:
    maps = torch.randn(2, 1, 8, 6)
    torch.testing.assert_close(resize(maps, *size, mode), F.interpolate(maps, size=size, mode=mode))
