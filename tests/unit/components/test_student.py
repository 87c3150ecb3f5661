# SPDX-License-Identifier: Apache-2.0

"""The student and its dual-domain blocks."""

import pytest
import torch

from anomalib_dhkd.components.dual_domain import DualDomainBlock, FrequencyBranch
from anomalib_dhkd.components.student import DenoisingStudent


@pytest.mark.parametrize("frequency_branch", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (5, 9)])
def test_shapes(frequency_branch: bool, size: tuple[int, int]) -> None:
    features, condition = torch.randn(2, 12, *size), torch.randn(1, 4, *size)
    student = DenoisingStudent(12, 4, width=8, blocks=2, frequency_branch=frequency_branch)
    assert student(features, condition).shape == features.shape
    assert not torch.equal(student(features, condition), student(features, 2 * condition))


def test_frequency_branch_sees_the_whole_image_and_the_spatial_one_does_not() -> None:
    x = torch.randn(1, 16, 16, 16, requires_grad=True)
    for frequency_branch, reach in ((True, 16 * 16), (False, 5 * 5)):
        block = DualDomainBlock(16, frequency_branch).eval()
        (gradient,) = torch.autograd.grad(block(x)[0, :, 8, 8].sum(), x)
        assert ((gradient.abs().sum(1) > 0).sum() > reach * 0.9).item()
        assert ((gradient.abs().sum(1) > 0).sum() <= reach).item()


def test_switched_off_frequency_branch_is_gone() -> None:
    modules = list(DenoisingStudent(4, 4, width=8, blocks=3, frequency_branch=False).modules())
    assert not any(isinstance(module, FrequencyBranch) for module in modules)
