# SPDX-License-Identifier: Apache-2.0

"""Noise on features."""

import pytest
import torch

from anomalib_dhkd.components.noise import COVERAGE, add_region_noise


def test_noise_covers_its_share_with_its_strength() -> None:
    features = torch.randn(16, 32, 24, 24)
    noise = add_region_noise(features, std=0.7) - features
    touched = (noise != 0).any(dim=1)
    # One region for all channels.
    assert ((noise != 0).float().mean(dim=1)[touched] > 0.95).all()
    assert touched.float().mean().item() == pytest.approx(COVERAGE, abs=0.02)
    assert noise.permute(0, 2, 3, 1)[touched].std().item() == pytest.approx(0.7, rel=0.03)


def test_noise_comes_in_regions() -> None:
    noise = add_region_noise(torch.zeros(64, 1, 24, 24), std=1.0)
    mask = (noise != 0).float()
    # Independent positions would agree with their neighbour in 0.3^2 + 0.7^2 = 58 % of the cases.
    assert (mask[..., 1:] == mask[..., :-1]).float().mean() > 0.85
