# SPDX-License-Identifier: Apache-2.0

"""Tests of the response shift."""

import pytest
import torch

from anomalib_dhkd.metrics import ResponseShift


def test_equals_its_formula_over_batches() -> None:
    responses = torch.randn(6, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 5
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    masks = torch.zeros(6, 16, 16, dtype=torch.bool)
    masks[1, :8, :4] = True  # 2 x 1 positions
    masks[3, 15, 15] = True  # one pixel is enough for its position
    responses[1, :, :2, 0] += 4
    shift, two_scales = ResponseShift([3]), ResponseShift([3, 3])
    for part in (slice(0, 2), slice(2, 6)):
        shift.update([responses[part]], labels[part], masks[part])
        two_scales.update([responses[part], 7 * responses[part] + 1], labels[part], masks[part])
    good = responses[labels == 0].movedim(1, -1).reshape(-1, 3)
    anomalous = torch.cat([responses[1, :, :2, 0].T, responses[3, :, 3, 3][None]])
    expected = ((anomalous - good.mean(0)).square().mean(0) / good.var(0, correction=0)).mean()
    torch.testing.assert_close(shift.compute(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(two_scales.compute(), expected, rtol=1e-3, atol=0)


def test_is_one_where_anomalies_change_nothing_and_nan_without_them() -> None:
    responses = torch.randn(400, 2, 4, 4)
    shift = ResponseShift([2])
    shift.update([responses], torch.arange(400) % 2, None)
    assert shift.compute() == pytest.approx(1, abs=0.05)
    shift.reset()
    shift.update([responses], torch.zeros(400), None)
    assert shift.compute().isnan()
