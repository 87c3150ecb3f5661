# SPDX-License-Identifier: Apache-2.0

"""Memory of normal features, in which each position of an image looks for its nearest neighbour."""

import logging
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

logger = logging.getLogger(__name__)


class FeatureMemory(nn.Module):
    r"""Few features that cover those of all training positions, and the distance to the nearest of them.

    The best denoiser :math:`E[f \mid f + \varepsilon]` of Gaussian noise over the training features is their mean
    weighted by a softmax of the negative squared distances; for little noise, that is the nearest one. The memory is
    this limit: a student that has forgotten nothing rare, which a small network does. The features are those of all
    scales, on the grid of the coarsest.

    They are chosen by greedy k-center selection, as in PatchCore (Roth et al., "Towards Total Recall in Industrial
    Anomaly Detection", CVPR 2022).

    Args:
        channels (int): Channels of all scales together.
        size (int): Number of features.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.register_buffer("prototypes", torch.zeros(size, channels))
        self.prototypes: torch.Tensor

    @staticmethod
    def _join(features: list[torch.Tensor]) -> torch.Tensor:
        size = features[-1].shape[-2:]
        joined = [F.interpolate(feature, size=size, mode="bilinear") for feature in features[:-1]]
        return torch.cat([*joined, features[-1]], dim=1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Compute the distance of each position to the nearest feature of the memory.

        Args:
            features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a scale.

        Returns:
            torch.Tensor: Squared distance, mean over channels, of shape ``(B, 1, h, w)`` with the coarsest scale's
                ``h`` and ``w``.
        """
        joined = self._join(features)
        # |f - p|^2 = |f|^2 - 2 f p + |p|^2; the part with p is a 1x1 convolution.
        kernel = -2 * self.prototypes[:, :, None, None]
        nearest = F.conv2d(joined, kernel, self.prototypes.square().sum(dim=1)).amin(dim=1, keepdim=True)
        return (joined.square().sum(dim=1, keepdim=True) + nearest) / joined.shape[1]

    @torch.no_grad()
    def fit(self, batches: Iterable[list[torch.Tensor]], pool: int = 1 << 17) -> None:
        """Choose the features anew.

        Args:
            batches (Iterable[list[torch.Tensor]]): Standardised features of the training images.
            pool (int): Number of positions to choose from at once; with more, what was chosen so far competes with
                the next ones, so that many images take no more memory than few. Defaults to ``131072``.
        """
        count = 0
        waiting: list[torch.Tensor] = []
        for features in batches:
            rows = self._join(features).permute(0, 2, 3, 1).flatten(0, 2)
            count += len(rows)
            waiting.append(rows)
            if sum(map(len, waiting)) >= pool:
                waiting = [select_k_centers(torch.cat(waiting), len(self.prototypes))]
        self.prototypes.copy_(select_k_centers(torch.cat(waiting), len(self.prototypes)))
        logger.info("The memory has room for %d of %d positions of the training images.", len(self.prototypes), count)


def select_k_centers(points: torch.Tensor, count: int) -> torch.Tensor:
    """Choose points greedily, each as far as possible from those before it.

    anomalib's ``KCenterGreedy`` does the same from a random first point; this one always chooses the same.

    Args:
        points (torch.Tensor): Points of shape ``(N, C)``.
        count (int): How many to choose; if more than there are different ones, some come repeatedly.

    Returns:
        torch.Tensor: The chosen ones, of shape ``(count, C)``; the first is the one farthest from the origin.
    """
    squares = points.square().sum(dim=1)
    chosen = [squares.argmax()]
    distances = torch.full_like(squares, torch.inf)
    for _ in range(count - 1):
        center = chosen[-1]
        distances = torch.minimum(distances, squares - 2 * (points @ points[center]) + squares[center])
        distances[center] = 0
        chosen.append(distances.argmax())
    return points[torch.stack(chosen)]
