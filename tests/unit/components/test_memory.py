# SPDX-License-Identifier: Apache-2.0

"""The memory of normal features and the choice of what it keeps."""

import pytest
import torch
from anomalib.models.components import KCenterGreedy
from torch.nn import functional as F  # noqa: N812

from anomalib_dhkd.components.memory import FeatureMemory, select_k_centers


@pytest.mark.parametrize("size", [(8, 8), (9, 5)])
def test_distance_is_that_to_the_nearest_feature(size: tuple[int, int]) -> None:
    coarse = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    features = [torch.randn(3, 4, *size), torch.randn(3, 6, *coarse)]
    memory = FeatureMemory(10, 20)
    memory.prototypes.normal_()
    joined = torch.cat([F.interpolate(features[0], size=coarse, mode="bilinear"), features[1]], dim=1)
    rows = joined.permute(0, 2, 3, 1).reshape(-1, 10)
    expected = torch.cdist(rows, memory.prototypes).square().amin(dim=1).reshape(3, 1, *coarse) / 10
    torch.testing.assert_close(memory(features), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", [1 << 16, 100])
def test_rare_positions_are_kept(pool: int) -> None:
    batches = [[0.1 * torch.randn(4, 5, 6, 6)] for _ in range(6)]
    batches[2][0][1, :, 3, 3] = 5.0
    batches[4][0][0, :, 0, 0] = -5.0
    memory = FeatureMemory(5, 16)
    memory.fit(batches, pool=pool)
    for batch, image, row, column in ((2, 1, 3, 3), (4, 0, 0, 0)):
        assert memory(batches[batch])[image, 0, row, column] < 1e-4
    unseen = torch.full((1, 5, 6, 6), 2.5)
    everything = torch.cat([memory(batch) for batch in batches])
    assert memory([unseen]).min() > 10 * everything.max()


def test_fewer_positions_than_the_memory_has_room_for() -> None:
    features = [torch.randn(2, 5, 3, 3)]
    memory = FeatureMemory(5, 50)
    memory.fit([features])
    assert memory(features).max() < 1e-4
    assert len(memory.prototypes.unique(dim=0)) == 18


def test_selection_is_as_good_as_anomalibs() -> None:
    points = torch.randn(500, 6)
    sampler = KCenterGreedy(points[:, :, None], sampling_ratio=0.1)  # three dimensions: without random projection
    radii = [
        torch.cdist(points, chosen).amin(dim=1).max()
        for chosen in (select_k_centers(points, 50), sampler.sample_coreset()[:, :, 0])
    ]
    assert radii[0] < 1.1 * radii[1]


def test_selection_takes_the_farthest_point_each_time() -> None:
    points = torch.randn(60, 3)
    chosen = select_k_centers(points, 10)
    assert torch.equal(chosen[0], points[points.norm(dim=1).argmax()])
    for count in range(1, 10):
        distances = torch.cdist(points, chosen[:count]).amin(dim=1)
        torch.testing.assert_close(chosen[count], points[distances.argmax()])
