# SPDX-License-Identifier: Apache-2.0

"""Memory of normal features, and the distance to the nearest of them."""

from collections.abc import Iterable

import torch
from torch import nn

from .features import choose, join

CANDIDATES = 30_000
"""Positions at most that the memory is chosen from; more take longer and find no more."""


class FeatureMemory(nn.Module):
    """Some features of normal positions, and the distance to the nearest, as in PatchCore (CVPR 2022).

    The mixtures know how normal features vary and take what lies in a direction of small variance for a defect, also
    if it is another light. Here all directions are alike: less is found, but fewer good images are taken for bad ones,
    so the two do better together. What is kept are positions that lie as far from one another as possible (greedy
    k-center). anomalib's ``KCenterGreedy`` draws a projection that no seed of a training reaches.

    Args:
        channels (int): Channels of all scales together.
        size (int): Number of features that are kept.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(size, channels))
        self.kept: torch.Tensor

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Compute the distance of each position to the nearest feature that is kept.

        Args:
            features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a scale.

        Returns:
            torch.Tensor: Squared distance, mean over channels, of shape ``(B, 1, h, w)`` with the coarsest scale's
                ``h`` and ``w``.
        """
        rows = join(features)
        nearest = (self.kept.square().sum(dim=1) - 2 * rows @ self.kept.mT).amin(dim=1) + rows.square().sum(dim=1)
        batch, _, height, width = features[-1].shape
        return nearest.clamp_min(0).reshape(batch, 1, height, width) / rows.shape[1]

    @torch.no_grad()
    def fit(self, batches: Iterable[list[torch.Tensor]]) -> None:
        """Choose anew what is kept.

        Args:
            batches (Iterable[list[torch.Tensor]]): Standardised features of the training images.
        """
        rows, _ = choose(batches, CANDIDATES)
        squares = rows.square().sum(dim=1)
        chosen = rows.new_zeros(len(self.kept), dtype=torch.long)
        nearest = torch.full_like(squares, torch.inf)
        for number in range(1, len(chosen)):
            last = rows[chosen[number - 1]]
            nearest = nearest.minimum(squares + last.square().sum() - 2 * rows @ last)
            chosen[number] = nearest.argmax()
        self.kept.copy_(rows[chosen])
