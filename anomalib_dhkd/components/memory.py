# SPDX-License-Identifier: Apache-2.0

"""Memory of normal features, and the distance to the nearest of them."""

from collections.abc import Iterable

import torch
from torch import nn

from .features import choose, join

CANDIDATES = 30_000
"""Positions at most that the memory is chosen from; more take longer and find no more."""
LEAST = 0.01
"""Least distance. Without it, the logarithm of what a kept position has to itself would outweigh all others."""


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
            torch.Tensor: Squared distance, mean over channels, at least 0.01, of shape ``(B, 1, h, w)`` with the
                coarsest scale's ``h`` and ``w``.
        """
        rows = join(features)
        nearest = (self.kept.square().sum(dim=1) - 2 * rows @ self.kept.mT).amin(dim=1) + rows.square().sum(dim=1)
        batch, _, height, width = features[-1].shape
        return nearest.div(rows.shape[1]).clamp_min(LEAST).reshape(batch, 1, height, width)

    @torch.no_grad()
    def fit(self, batches: Iterable[list[torch.Tensor]]) -> None:
        """Choose anew what is kept: of few positions half, so that the others say how far apart normal ones are.

        Args:
            batches (Iterable[list[torch.Tensor]]): Standardised features of the training images.
        """
        rows, _ = choose(batches, CANDIDATES)
        squares = rows.square().sum(dim=1)
        chosen = rows.new_zeros(max(1, min(len(self.kept), len(rows) // 2)), dtype=torch.long)
        nearest = torch.full_like(squares, torch.inf)
        for number in range(1, len(chosen)):
            last = rows[chosen[number - 1]]
            nearest = nearest.minimum(squares + last.square().sum() - 2 * rows @ last)
            chosen[number] = nearest.argmax()
        self.kept.copy_(rows[chosen.repeat(-(-len(self.kept) // len(chosen)))[: len(self.kept)]])
