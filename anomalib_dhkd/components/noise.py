# SPDX-License-Identifier: Apache-2.0

"""Gaussian noise on features, by which the student learns to denoise."""

import torch
from torch.nn import functional as F  # noqa: N812

COVERAGE = 0.3
"""Expected share of positions that get noise; noise everywhere detects the same."""
CELLS = 4
"""A region mask is interpolated from so many rows and columns of random values; fewer make larger regions."""


def add_region_noise(features: torch.Tensor, std: float) -> torch.Tensor:
    """Add Gaussian noise inside random smooth regions, to simulate anomalies at the feature level.

    The paper states Gaussian noise on features; that it covers regions, as a defect does, is this project's choice.
    One region mask serves all channels of an image.

    Args:
        features (torch.Tensor): Standardised features of shape ``(B, C, H, W)``.
        std (float): Standard deviation of the noise, in standard deviations of a channel.

    Returns:
        torch.Tensor: Features of the same shape.
    """
    batch, channels, height, width = features.shape
    field = F.interpolate(
        torch.randn(batch, 1, CELLS, CELLS, device=features.device),
        size=(height, width),
        mode="bicubic",
        align_corners=True,
    )
    mask = field >= torch.quantile(field.flatten(1), 1 - COVERAGE, dim=1)[:, None, None, None]
    # Drawn in channels-last order, like the features: on a CPU, PyTorch draws many times slower across strides.
    noise = torch.randn(batch, height, width, channels, device=features.device).movedim(-1, 1)
    return features + std * mask * noise
