# SPDX-License-Identifier: Apache-2.0

"""Dual-domain reconstruction block.

The paper's abstract names a dual-domain reconstruction module that filters anomalous information out inside the
student. That the domains are space and frequency, and how they are joined, is this project's choice.
"""

import torch
from torch import nn

from .dft import irfft2, rfft2


class FrequencyBranch(nn.Module):
    """Two 1x1 convolutions on the real and imaginary parts of the spectrum.

    Each frequency of a map depends on every position, so this branch sees the whole image at once and can suppress
    what doesn't fit into it.

    Args:
        channels (int): Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(2 * channels, 2 * channels, kernel_size=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Filter maps of shape ``(B, C, H, W)`` in the frequency domain; the shape stays."""
        spectrum = self.layers(torch.cat(rfft2(x), dim=1))
        channels = x.shape[1]
        return irfft2(spectrum[:, :channels], spectrum[:, channels:], width=x.shape[-1])


class DualDomainBlock(nn.Module):
    r"""Residual block that joins a spatial and a frequency branch by a learned gate.

    .. math::
        y = x + g \odot s(x) + (1 - g) \odot f(x), \quad g = \sigma(w * [s(x), f(x)])

    Args:
        channels (int): Channels of input and output.
        frequency_branch (bool): With ``False`` the block is the plain residual ``x + s(x)``. Defaults to ``True``.
    """

    def __init__(self, channels: int, frequency_branch: bool = True) -> None:
        super().__init__()
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.frequency = FrequencyBranch(channels) if frequency_branch else None
        self.gate = nn.Conv2d(2 * channels, channels, kernel_size=1) if frequency_branch else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, H, W)`` to the same shape."""
        spatial = self.spatial(x)
        if self.frequency is None or self.gate is None:
            return torch.relu(x + spatial)
        frequency = self.frequency(x)
        gate = torch.sigmoid(self.gate(torch.cat([spatial, frequency], dim=1)))
        return torch.relu(x + gate * spatial + (1 - gate) * frequency)
