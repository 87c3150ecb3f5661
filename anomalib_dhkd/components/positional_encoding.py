# SPDX-License-Identifier: Apache-2.0

"""Fixed 2-D sinusoidal positional encoding.

Source: AST (Rudolph et al., "Asymmetric Student-Teacher Networks for Industrial Anomaly Detection", WACV 2023)
conditions its flow on such an encoding, so that the density may depend on the place in the image.
"""

import math

import torch


def sinusoidal_encoding(channels: int, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Encode each position of a grid by sines and cosines of its row and its column.

    The first half of the channels encodes the row, the second half the column. It is computed rather than stored, so
    that it follows the grid of whatever image arrives.

    Args:
        channels (int): Number of channels, a positive multiple of 4.
        height (int): Rows of the grid.
        width (int): Columns of the grid.
        device (torch.device | None): Device of the result. Defaults to ``None``, the CPU.

    Returns:
        torch.Tensor: Encoding of shape ``(1, channels, height, width)`` with values in ``[-1, 1]``.

    Raises:
        ValueError: If ``channels`` is not a positive multiple of 4.

    Example:
        >>> sinusoidal_encoding(32, 8, 12).shape
        torch.Size([1, 32, 8, 12])
    """
    if channels <= 0 or channels % 4:
        msg = f"channels must be a positive multiple of 4, got {channels}."
        raise ValueError(msg)
    frequencies = torch.exp(torch.arange(channels // 4, device=device) * (-math.log(10000.0) / (channels // 4)))
    rows = frequencies[:, None] * torch.arange(height, device=device)
    columns = frequencies[:, None] * torch.arange(width, device=device)
    row_code = torch.cat([rows.sin(), rows.cos()])[:, :, None].expand(-1, height, width)
    column_code = torch.cat([columns.sin(), columns.cos()])[:, None, :].expand(-1, height, width)
    return torch.cat([row_code, column_code])[None]
