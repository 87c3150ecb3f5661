# SPDX-License-Identifier: Apache-2.0

"""The memory of normal features."""

import torch

from anomalib_dhkd.components.features import join
from anomalib_dhkd.components.memory import LEAST, FeatureMemory


def _features(*batches: int) -> list[list[torch.Tensor]]:
    return [[torch.randn(batch, 4, 8, 8), torch.randn(batch, 6, 4, 4)] for batch in batches]


def test_the_distance_is_that_to_the_nearest() -> None:
    memory = FeatureMemory(10, 5)
    memory.kept.normal_()
    (features,) = _features(2)
    memory.kept[0] = join(features)[3]
    expected = torch.cdist(join(features), memory.kept).square().amin(dim=1).div(10)
    assert expected[3] < 1e-4
    expected[3] = LEAST
    torch.testing.assert_close(memory(features), expected.reshape(2, 1, 4, 4), rtol=1e-4, atol=1e-4)


def test_what_is_kept_is_far_apart_and_from_all_images() -> None:
    batches = _features(3, 2)
    rows = torch.cat([join(features) for features in batches])
    memory = FeatureMemory(10, 20)
    memory.fit(batches)
    assert all((rows == kept).all(dim=1).any() for kept in memory.kept)
    apart = torch.cdist(memory.kept, memory.kept)[~torch.eye(20, dtype=torch.bool)]
    # Of greedily chosen points, none is nearer to another than any position is to the nearest of them in the end.
    assert apart.min() >= torch.cdist(rows, memory.kept).amin(dim=1).max() - 1e-3


def test_of_few_positions_half_are_kept() -> None:
    (features,) = _features(1)
    memory = FeatureMemory(10, 50)
    memory.fit([features])
    assert len(memory.kept.unique(dim=0)) == 8
    assert (memory(features) > LEAST).sum() == 8
    first = memory.kept.clone()
    memory.fit([features])
    torch.testing.assert_close(memory.kept, first, rtol=0, atol=0)
