# SPDX-License-Identifier: Apache-2.0

"""Two-dimensional real Fourier transform by matrix products.

``torch.fft`` can be exported to ONNX, but OpenVINO can't read the result, and its half precision accepts powers of two
only. Feature grids are 8 to 64 wide, where a product with a constant matrix is cheap and runs everywhere.
"""

import math

import torch


def _angles(rows: int, columns: int, period: int, like: torch.Tensor) -> torch.Tensor:
    """Return ``2 pi (r c mod period) / period``; the remainder keeps float32 exact for long grids."""
    product = torch.arange(rows, device=like.device)[:, None] * torch.arange(columns, device=like.device)
    return (product % period).to(like.dtype) * (2 * math.pi / period)


def rfft2(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Transform real maps to the frequency domain, as ``torch.fft.rfft2(x, norm="ortho")`` does.

    .. math::
        X_{uv} = \frac{1}{\sqrt{HW}} \sum_{y, x} f_{yx} \, e^{-2 \pi i (uy/H + vx/W)}

    Args:
        x (torch.Tensor): Real maps of shape ``(..., H, W)``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Real and imaginary part, each of shape ``(..., H, W // 2 + 1)``.

    Example:
        >>> real, imag = rfft2(torch.ones(1, 1, 4, 6))
        >>> real.shape, round(real[0, 0, 0, 0].item(), 4)
        (torch.Size([1, 1, 4, 4]), 4.899)
    """
    height, width = x.shape[-2:]
    along_width = _angles(width, width // 2 + 1, width, x)
    along_height = _angles(height, height, height, x)
    scale = 1 / math.sqrt(height * width)
    real, imag = x @ (along_width.cos() * scale), x @ (along_width.sin() * -scale)
    cos, sin = along_height.cos(), along_height.sin()
    return cos @ real + sin @ imag, cos @ imag - sin @ real


def irfft2(real: torch.Tensor, imag: torch.Tensor, width: int) -> torch.Tensor:
    """Transform a half spectrum back to real maps, as ``torch.fft.irfft2(z, s=(H, width), norm="ortho")`` does.

    Args:
        real (torch.Tensor): Real part of shape ``(..., H, width // 2 + 1)``.
        imag (torch.Tensor): Imaginary part of the same shape.
        width (int): Width of the maps; the half spectrum alone doesn't tell even from odd.

    Returns:
        torch.Tensor: Real maps of shape ``(..., H, width)``.
    """
    height, bins = real.shape[-2:]
    along_height = _angles(height, height, height, real)
    along_width = _angles(bins, width, width, real)
    cos, sin = along_height.cos(), along_height.sin()
    real, imag = cos @ real - sin @ imag, cos @ imag + sin @ real
    # Every bin but the first, and the last of an even width, also stands for its mirrored negative frequency.
    index = torch.arange(bins, device=real.device)[:, None]
    weight = torch.where((index == 0) | (2 * index == width), 1.0, 2.0).to(real.dtype) / math.sqrt(height * width)
    return real @ (along_width.cos() * weight) - imag @ (along_width.sin() * weight)
