# SPDX-License-Identifier: Apache-2.0

"""Mean and variance over batches."""

import pytest
import torch

from anomalib_dhkd.components.moments import mean_and_variance, moments


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_batches_of_any_size_give_the_moments_of_all(offset: float) -> None:
    values = (torch.randn(1000, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]) + offset) ** 2
    total = sum(moments(part) for part in values.split([1, 9, 990]))
    mean, variance = mean_and_variance(total)
    torch.testing.assert_close(mean, values.mean(dim=0))
    torch.testing.assert_close(variance, values.var(dim=0, correction=0), rtol=1e-3, atol=0)


def test_no_values_no_moments() -> None:
    assert all(value.isnan().all() for value in mean_and_variance(moments(torch.zeros(0, 2))))
