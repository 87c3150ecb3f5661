# SPDX-License-Identifier: Apache-2.0

"""Dual-domain reconstruction block.

The paper's abstract names a dual-domain reconstruction module that filters anomalous information out inside the
student. That the domains are space and frequency, and how they are joined, is this project's choice.
"""

import torch
from torch import nn

from .fourier import fourier_transform, inverse_fourier_transform


class FrequencyBranch(nn.Module):
    """Two 1x1 convolutions on the coefficients of the Fourier transform.

    Each frequency of a map depends on every position, so this branch sees the whole image at once and can suppress
    what doesn't fit into it. It works on a sixteenth of the channels: the transforms cost more than the convolutions.

    Args:
        channels (int): Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = max(1, channels // 16)
        self.reduce = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.layers = nn.Sequential(
            nn.Conv2d(4 * width, 4 * width, kernel_size=1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * width, 4 * width, kernel_size=1),
        )
        self.expand = nn.Conv2d(width, channels, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Filter maps of shape ``(B, C, H, W)`` in the frequency domain; the shape stays."""
        height, width = x.shape[-2:]
        spectrum = self.layers(fourier_transform(self.reduce(x)))
        return self.expand(inverse_fourier_transform(spectrum, (height, width)))


class DualDomainBlock(nn.Module):
    r"""Residual block that joins a spatial and a frequency branch by a learned gate, one value a channel.

    .. math::
        y = \operatorname{ReLU}(x + \sigma(g) \odot s(x) + (1 - \sigma(g)) \odot f(x))

    The spatial branch :math:`s` is a depthwise-separable convolution.

    Args:
        channels (int): Channels of input and output.
        frequency_branch (bool): With ``False`` the block is the plain residual ``ReLU(x + s(x))``. Defaults to
            ``True``.
        kernel_size (int): Rows and columns of the depthwise convolution, odd. Defaults to ``5``.
    """

    def __init__(self, channels: int, frequency_branch: bool = True, kernel_size: int = 5) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size, padding="same", groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.frequency = FrequencyBranch(channels) if frequency_branch else None
        self.gate = nn.Parameter(torch.zeros(channels, 1, 1)) if frequency_branch else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        spatial = self.spatial(x)
        if self.frequency is None or self.gate is None:
            return torch.relu(x + spatial)
        gate = torch.sigmoid(self.gate)
        return torch.relu(x + gate * spatial + (1 - gate) * self.frequency(x))
