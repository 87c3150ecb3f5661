# SPDX-License-Identifier: Apache-2.0

"""Denoising student (the paper's DSN): a feed-forward network that predicts the teacher's output."""

import torch
from torch import nn

from .dual_domain import DualDomainBlock


class DenoisingStudent(nn.Module):
    """1x1 convolution in, dual-domain blocks, 1x1 convolution out, for the feature maps of one scale.

    Args:
        channels (int): Channels of the features and of the teacher's output.
        condition_channels (int): Channels of the condition.
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
        self.enter_condition = nn.Conv2d(condition_channels, width, kernel_size=1, bias=False)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            *(DualDomainBlock(width, frequency_branch) for _ in range(blocks)),
            nn.Conv2d(width, channels, kernel_size=1),
        )

    def forward(self, features: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Predict the teacher's output.

        Args:
            features (torch.Tensor): Standardised features of shape ``(B, C, H, W)``.
            condition (torch.Tensor): Condition of shape ``(1 or B, condition_channels, H, W)``.

        Returns:
            torch.Tensor: Prediction of shape ``(B, C, H, W)``.
        """
        return self.layers(self.enter(features) + self.enter_condition(condition))
