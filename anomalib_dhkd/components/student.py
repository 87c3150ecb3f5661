# SPDX-License-Identifier: Apache-2.0

"""Denoising student (the paper's DSN): a feed-forward network that predicts the teacher's output."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .dual_domain import DualDomainBlock


class DenoisingStudent(nn.Sequential):
    """Convolution in, dual-domain blocks, convolution out, for the feature maps of one scale.

    Maps ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``.

    Args:
        in_channels (int): Channels of the features and their condition.
        out_channels (int): Channels of the teacher's output.
        width (int): Channels between the two outer convolutions.
        blocks (int): Number of dual-domain blocks.
        frequency_branch (bool): Whether the blocks have their frequency branch.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, blocks: int, frequency_branch: bool) -> None:
        super().__init__(
            nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            *(DualDomainBlock(width, frequency_branch) for _ in range(blocks)),
            nn.Conv2d(width, out_channels, kernel_size=3, padding=1),
        )


def add_region_noise(features: torch.Tensor, std: float, coverage: float, cells: int = 4) -> torch.Tensor:
    """Add Gaussian noise inside random smooth regions, to simulate anomalies at the feature level.

    The paper states Gaussian noise on features; that it covers regions, as a defect does, is this project's choice.
    One region mask serves all channels of an image.

    Args:
        features (torch.Tensor): Standardised features of shape ``(B, C, H, W)``.
        std (float): Standard deviation of the noise, in standard deviations of a channel.
        coverage (float): Expected share of positions that get noise, in ``(0, 1]``.
        cells (int): The mask is interpolated from ``cells x cells`` random values; fewer make larger regions.
            Defaults to ``4``.

    Returns:
        torch.Tensor: Features of the same shape.
    """
    batch, _, height, width = features.shape
    field = F.interpolate(
        torch.randn(batch, 1, cells, cells, device=features.device),
        size=(height, width),
        mode="bicubic",
        align_corners=True,
    )
    mask = field >= torch.quantile(field.flatten(1), 1 - coverage, dim=1)[:, None, None, None]
    return features + std * mask * torch.randn_like(features)
