# SPDX-License-Identifier: Apache-2.0

"""The matrix-product DFT against torch.fft."""

import pytest
import torch

from anomalib_dhkd.components.dft import irfft2, rfft2

SIZES = [(1, 1), (2, 3), (7, 5), (8, 8), (12, 9), (9, 12), (32, 32), (48, 64)]


@pytest.mark.parametrize("size", SIZES)
def test_equals_torch_fft(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    real, imag = rfft2(x)
    reference = torch.fft.rfft2(x, norm="ortho")
    torch.testing.assert_close(torch.complex(real, imag), reference, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_inverse_equals_torch_fft(size: tuple[int, int]) -> None:
    spectrum = torch.fft.rfft2(torch.randn(2, 3, *size), norm="ortho")
    # A filtered spectrum is no longer that of a real map; both inverses must ignore the same parts of it.
    spectrum = spectrum * torch.randn(spectrum.shape, dtype=spectrum.dtype)
    reference = torch.fft.irfft2(spectrum, s=size, norm="ortho")
    torch.testing.assert_close(irfft2(spectrum.real, spectrum.imag, size[1]), reference, atol=5e-6, rtol=1e-5)


def test_round_trip() -> None:
    x = torch.randn(1, 4, 13, 10)
    torch.testing.assert_close(irfft2(*rfft2(x), width=10), x, atol=1e-5, rtol=1e-5)
