# SPDX-License-Identifier: Apache-2.0

"""The losses against their definitions."""

import math

import pytest
import torch

from anomalib_dhkd.loss import AffinityLoss, DistillationLoss, FlowLoss


def test_flow_loss_is_the_negative_log_likelihood() -> None:
    latent, log_det = torch.randn(5, 3, 4, 4), torch.randn(5)
    log_likelihood = torch.distributions.Normal(0, 1).log_prob(latent).sum(dim=(1, 2, 3)) + log_det
    constant = 0.5 * math.log(2 * math.pi)
    expected = -log_likelihood.mean() / latent[0].numel() - constant
    torch.testing.assert_close(FlowLoss()([latent], [log_det]), expected, atol=1e-5, rtol=1e-5)


def test_distillation_loss() -> None:
    teacher = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2)]
    student = [torch.full((2, 3, 4, 4), 2.0), torch.full((2, 5, 2, 2), 3.0)]
    assert DistillationLoss()(teacher, student).item() == pytest.approx(4 + 9)


def test_affinity_is_the_cosine_similarity_of_positions_row_by_row() -> None:
    maps = torch.randn(2, 5, 3, 4)
    affinity = AffinityLoss().affinity(maps)
    assert affinity.shape == (2, 12, 12)
    expected = torch.cosine_similarity(maps[1, :, 0, 3], maps[1, :, 2, 1], dim=0)
    torch.testing.assert_close(affinity[1, 3, 9], expected)


@pytest.mark.parametrize("grid", [(8, 8), (6, 11), (24, 40)])
def test_affinity_loss_of_equal_inputs_is_zero(grid: tuple[int, int]) -> None:
    maps = [torch.randn(2, 5, *grid)]
    assert AffinityLoss()(maps, maps).item() == 0
    assert AffinityLoss()(maps, [torch.randn(2, 5, *grid)]).item() > 0.01


def test_affinity_loss_ignores_a_joint_permutation_of_positions() -> None:
    teacher, student = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6)
    order = torch.randperm(24)
    moved_teacher, moved_student = (m.flatten(2)[..., order].view_as(m) for m in (teacher, student))
    torch.testing.assert_close(
        AffinityLoss()([moved_teacher], [moved_student]), AffinityLoss()([teacher], [student]), atol=1e-6, rtol=1e-5
    )
    assert AffinityLoss()([moved_teacher], [teacher]).item() > 0.01


def test_affinity_loss_ignores_scaling() -> None:
    teacher, student = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(
        AffinityLoss()([teacher * 7], [student * 0.1]), AffinityLoss()([teacher], [student]), atol=1e-6, rtol=1e-5
    )


def test_affinity_loss_sums_scales_and_pools_large_grids() -> None:
    teacher, student = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)
    pooled = [torch.nn.functional.avg_pool2d(m, 4) for m in (teacher, student)]
    loss = AffinityLoss(max_grid=8)
    single = loss([teacher], [student])
    torch.testing.assert_close(single, AffinityLoss()([pooled[0]], [pooled[1]]))
    torch.testing.assert_close(loss([teacher, teacher], [student, student]), 2 * single)
