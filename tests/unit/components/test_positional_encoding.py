# SPDX-License-Identifier: Apache-2.0

"""The positional encoding."""

import pytest
import torch

from anomalib_dhkd.components.positional_encoding import sinusoidal_encoding


def test_every_position_has_its_own_code() -> None:
    encoding = sinusoidal_encoding(16, 6, 9)
    assert encoding.shape == (1, 16, 6, 9)
    assert encoding.abs().max() <= 1
    codes = encoding[0].flatten(1).T
    distance = torch.cdist(codes, codes) + torch.eye(len(codes)) * 10
    assert distance.min() > 0.01


def test_halves_encode_row_and_column() -> None:
    encoding = sinusoidal_encoding(8, 5, 5)[0]
    assert (encoding[:4] == encoding[:4, :, :1]).all()
    assert (encoding[4:] == encoding[4:, :1, :]).all()


@pytest.mark.parametrize("channels", [-4, 0, 6])
def test_bad_channels(channels: int) -> None:
    with pytest.raises(ValueError, match=f"channels .* got {channels}"):
        sinusoidal_encoding(channels, 4, 4)
