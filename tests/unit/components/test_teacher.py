# SPDX-License-Identifier: Apache-2.0

"""The flow against the definition of a normalising flow."""

import pytest
import torch
from torch import nn

from anomalib_dhkd.components.teacher import FlowTeacher

CONDITION = torch.zeros(1, 4, 1, 1)


def _teacher(channels: int) -> FlowTeacher:
    """Return a flow whose couplings do something, unlike those of a fresh one."""
    teacher = FlowTeacher(channels, 4, steps=4, hidden_channels=16)
    for module in teacher.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, a=3)
    return teacher


@pytest.mark.parametrize("channels", [2, 5, 40])
def test_inverts(channels: int) -> None:
    teacher = _teacher(channels)
    x, condition = torch.randn(3, channels, 6, 5), torch.randn(3, 4, 6, 5)
    z, log_det = teacher(x, condition)
    restored, inverse_log_det = teacher(z, condition, reverse=True)
    assert (z - x).abs().max() > 0.1
    torch.testing.assert_close(restored, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-3, rtol=1e-4)


def test_log_determinant_equals_autograd() -> None:
    teacher = _teacher(3).double()
    x, condition = torch.randn(1, 3, 2, 3).double(), torch.randn(1, 4, 2, 3).double()
    jacobian = torch.autograd.functional.jacobian(lambda v: teacher(v, condition)[0], x).reshape(18, 18)
    log_det = teacher(x, condition)[1]
    assert log_det.abs() > 0.01
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_det[0])


def test_starts_as_the_identity() -> None:
    x = torch.randn(2, 6, 4, 4)
    z, log_det = FlowTeacher(6, 4, steps=4, hidden_channels=8)(x, CONDITION)
    torch.testing.assert_close(z, x)
    assert (log_det == 0).all()


def test_a_step_changes_half_of_the_channels_given_the_other_half() -> None:
    teacher, x = _teacher(6), torch.randn(1, 6, 4, 4)
    changed = []
    for coupling in teacher.flow.module_list:
        (z,), _ = coupling([x], [CONDITION])
        changed.append((z != x).any(dim=(0, 2, 3)))
        assert changed[-1].sum() == 3
        (again,), _ = coupling([torch.where(changed[-1][:, None, None], x + 1, x)], [CONDITION])
        torch.testing.assert_close((again / z - 1)[:, ~changed[-1]], torch.zeros(1, 3, 4, 4))
    assert all((first ^ second).all() for first, second in zip(changed[::2], changed[1::2], strict=True))


def test_without_log_determinant_the_output_is_the_same() -> None:
    teacher, x = _teacher(4), torch.randn(2, 4, 5, 5)
    z, log_det = teacher(x, CONDITION, log_det=False)
    torch.testing.assert_close(z, teacher(x, CONDITION)[0])
    assert (log_det == 0).all()


def test_condition_matters() -> None:
    teacher, x = _teacher(4), torch.randn(1, 4, 5, 5)
    first, second = (teacher(x, torch.full((1, 4, 5, 5), value))[0] for value in (0.0, 1.0))
    assert (first - second).abs().max() > 1e-3
