# SPDX-License-Identifier: Apache-2.0

"""Denoising student (the paper's DSN): a feed-forward network that predicts the teacher's output."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .dual_domain import DualDomainBlock


class DenoisingStudent(nn.Module):
    """1x1 convolution in, dual-domain blocks, 1x1 convolution out, for the feature maps of one scale.

    Args:
        channels (int): Channels of the features and of the teacher's output.
        condition_channels (int): Channels of the condition, 0 for none.
        width (int): Channels between the two outer convolutions.
        blocks (int): Number of dual-domain blocks.
        frequency_branch (bool): Whether the blocks have their frequency branch.
    """

    def __init__(
        self,
        channels: int,
        condition_channels: int,
        width: int,
        blocks: int,
        frequency_branch: bool,
    ) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.enter_condition = (
            nn.Conv2d(condition_channels, width, kernel_size=1, bias=False) if condition_channels else None
        )
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            *(DualDomainBlock(width, frequency_branch) for _ in range(blocks)),
            nn.Conv2d(width, channels, kernel_size=1),
        )

    def forward(self, features: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Predict the teacher's output.

        Args:
            features (torch.Tensor): Standardised features of shape ``(B, C, H, W)``.
            condition (torch.Tensor | None): Condition of shape ``(1 or B, condition_channels, H, W)``.

        Returns:
            torch.Tensor: Prediction of shape ``(B, C, H, W)``.
        """
        hidden = self.enter(features)
        if self.enter_condition is not None and condition is not None:
            hidden = hidden + self.enter_condition(condition)
        return self.layers(hidden)


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
    batch, channels, height, width = features.shape
    field = F.interpolate(
        torch.randn(batch, 1, cells, cells, device=features.device),
        size=(height, width),
        mode="bicubic",
        align_corners=True,
    )
    mask = field >= torch.quantile(field.flatten(1), 1 - coverage, dim=1)[:, None, None, None]
    # Drawn in channels-last order, like the features: on a CPU, PyTorch draws many times slower across strides.
    noise = torch.randn(batch, height, width, channels, device=features.device).movedim(-1, 1)
    return features + std * mask * noise
