# SPDX-License-Identifier: Apache-2.0

"""The Fourier transform by matrix products against ``torch.fft``."""

import pytest
import torch

from anomalib_dhkd.components.fourier import fourier_basis, fourier_transform, inverse_fourier_transform

SIZES = [(8, 8), (16, 32), (7, 12), (9, 5), (64, 64), (1, 3)]


@pytest.mark.parametrize("size", SIZES)
def test_equals_torch_fft(size: tuple[int, int]) -> None:
    """Cosines and sines of both directions are sums and differences of the spectrum at (u, v) and (-u, v)."""
    x = torch.randn(2, 3, *size)
    rows, columns = size[0] // 2 + 1, size[1] // 2 + 1
    spectrum = torch.fft.fft2(x, norm="ortho")
    index = torch.arange(rows)
    positive, negative = spectrum[..., index, :columns], spectrum[..., -index % size[0], :columns]
    expected = [
        (positive + negative).real / 2,
        -(positive + negative).imag / 2,
        (negative - positive).imag / 2,
        (negative - positive).real / 2,
    ]
    # A frequency that is its own mirror image has no twin to share its energy with.
    norms = [
        torch.where((torch.arange(n) == 0) | (2 * torch.arange(n) == length), 1.0, 2**0.5)
        for n, length in zip((rows, columns), size, strict=True)
    ]
    actual = fourier_transform(x).view(2, 3, 4, rows, columns)
    for product, values in enumerate(expected):
        torch.testing.assert_close(actual[:, :, product], values * norms[0][:, None] * norms[1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_inverts(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(inverse_fourier_transform(fourier_transform(x), size), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1, 8, 9, 1000])
def test_basis_is_orthonormal(length: int) -> None:
    basis = fourier_basis(length, torch.zeros(0))
    torch.testing.assert_close(basis @ basis.mT, torch.eye(length), atol=1e-4, rtol=0)


def test_keeps_the_type() -> None:
    assert fourier_transform(torch.randn(1, 1, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
