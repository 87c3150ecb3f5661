# SPDX-License-Identifier: Apache-2.0

"""Two-dimensional Fourier transform of real maps by two matrix products.

``torch.fft`` can be exported to ONNX, but OpenVINO can't read the result, and its half precision accepts powers of two
only. Feature grids are 8 to 64 wide, where a product with a constant matrix is cheap and runs everywhere. In the real
form of the series nothing is complex, and the inverse is the transpose.
"""

import math

import torch


def fourier_basis(length: int, like: torch.Tensor) -> torch.Tensor:
    r"""Return the cosines and sines of the real Fourier series as an orthonormal basis.

    .. math::
        c_k(x) = a_k \cos(2 \pi k x / n), \quad s_k(x) = a_k \sin(2 \pi k x / n), \quad 0 \le k \le n / 2

    with :math:`a_k` such that each has norm 1. The sines of ``k = 0`` and, for an even length, of ``k = n/2`` vanish;
    they stay in as zeros, so that every frequency has a pair.

    Args:
        length (int): Number of positions ``n``.
        like (torch.Tensor): Tensor whose type and device the result gets.

    Returns:
        torch.Tensor: Shape ``(n, 2 * (n // 2 + 1))``, the cosines first.
    """
    frequencies = torch.arange(length // 2 + 1, device=like.device)
    # The remainder keeps the angles of long grids exact.
    angles = (torch.arange(length, device=like.device)[:, None] * frequencies) % length * (2 * math.pi / length)
    lone = (frequencies == 0) | (2 * frequencies == length)
    scale = torch.where(lone, 1.0, math.sqrt(2.0)) / math.sqrt(length)
    return torch.cat([angles.cos() * scale, angles.sin() * scale * ~lone], dim=1).to(like.dtype)


def fourier_transform(x: torch.Tensor) -> torch.Tensor:
    """Transform maps to the frequency domain.

    Args:
        x (torch.Tensor): Maps of shape ``(B, C, H, W)``.

    Returns:
        torch.Tensor: Coefficients of shape ``(B, 4 * C, H // 2 + 1, W // 2 + 1)``: for each channel the products of
            cosine and cosine, cosine and sine, sine and cosine, sine and sine along height and width. They hold the
            real and imaginary parts of the Fourier transform at the frequencies ``(u, v)`` and ``(-u, v)``.

    Example:
        >>> spectrum = fourier_transform(torch.ones(1, 1, 4, 6))
        >>> spectrum.shape, round(spectrum[0, 0, 0, 0].item(), 4)
        (torch.Size([1, 4, 3, 4]), 4.899)
    """
    batch, channels, height, width = x.shape
    spectrum = fourier_basis(height, x).mT @ x @ fourier_basis(width, x)
    spectrum = spectrum.view(batch, channels, 2, height // 2 + 1, 2, width // 2 + 1)
    return spectrum.transpose(3, 4).reshape(batch, 4 * channels, height // 2 + 1, width // 2 + 1)


def inverse_fourier_transform(spectrum: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Transform coefficients back to maps.

    Args:
        spectrum (torch.Tensor): Coefficients as :func:`fourier_transform` returns them.
        size (tuple[int, int]): Height and width of the maps; the coefficients don't tell even from odd.

    Returns:
        torch.Tensor: Maps of shape ``(B, C, *size)``.
    """
    batch, channels, rows, columns = spectrum.shape
    spectrum = spectrum.reshape(batch, channels // 4, 2, 2, rows, columns).transpose(3, 4)
    spectrum = spectrum.reshape(batch, channels // 4, 2 * rows, 2 * columns)
    height, width = size
    return fourier_basis(height, spectrum) @ spectrum @ fourier_basis(width, spectrum).mT
