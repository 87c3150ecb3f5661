# SPDX-License-Identifier: Apache-2.0

"""The student, its dual-domain blocks and its noise."""

import pytest
import torch

from anomalib_dhkd.components.dual_domain import DualDomainBlock, FrequencyBranch
from anomalib_dhkd.components.student import DenoisingStudent, add_region_noise


@pytest.mark.parametrize("frequency_branch", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_shapes(frequency_branch: bool, size: tuple[int, int]) -> None:
    features, condition = torch.randn(2, 12, *size), torch.randn(1, 4, *size)
    student = DenoisingStudent(12, 4, width=8, blocks=2, frequency_branch=frequency_branch)
    assert student(features, condition).shape == features.shape
    assert not torch.equal(student(features, condition), student(features, 2 * condition))
    assert DenoisingStudent(12, 0, 8, 2, frequency_branch)(features).shape == features.shape


def test_frequency_branch_sees_the_whole_image_and_the_spatial_one_does_not() -> None:
    x = torch.randn(1, 16, 16, 16, requires_grad=True)
    for frequency_branch, reach in ((True, 16 * 16), (False, 5 * 5)):
        block = DualDomainBlock(16, frequency_branch).eval()
        (gradient,) = torch.autograd.grad(block(x)[0, :, 8, 8].sum(), x)
        assert ((gradient.abs().sum(1) > 0).sum() > reach * 0.9).item()
        assert ((gradient.abs().sum(1) > 0).sum() <= reach).item()


def test_switched_off_frequency_branch_is_gone() -> None:
    modules = list(DenoisingStudent(4, 0, width=8, blocks=3, frequency_branch=False).modules())
    assert not any(isinstance(module, FrequencyBranch) for module in modules)


@pytest.mark.parametrize("coverage", [0.1, 0.5, 1.0])
def test_noise_covers_its_share_with_its_strength(coverage: float) -> None:
    features = torch.randn(16, 32, 24, 24)
    noise = add_region_noise(features, std=0.7, coverage=coverage) - features
    touched = (noise != 0).any(dim=1)
    # One region for all channels.
    assert ((noise != 0).float().mean(dim=1)[touched] > 0.95).all()
    assert touched.float().mean().item() == pytest.approx(coverage, abs=0.02)
    assert noise.permute(0, 2, 3, 1)[touched].std().item() == pytest.approx(0.7, rel=0.03)


def test_noise_comes_in_regions() -> None:
    noise = add_region_noise(torch.zeros(64, 1, 24, 24), std=1.0, coverage=0.3)
    mask = (noise != 0).float()
    # Independent positions would agree with their neighbour in 0.3^2 + 0.7^2 = 58 % of the cases.
    assert (mask[..., 1:] == mask[..., :-1]).float().mean() > 0.85
