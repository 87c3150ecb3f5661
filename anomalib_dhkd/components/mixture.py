# SPDX-License-Identifier: Apache-2.0

"""Mixture of local Gaussians over normal features."""

import logging
from collections.abc import Iterable

import torch
from sklearn.cluster import KMeans
from torch import nn
from torch.nn import functional as F  # noqa: N812

logger = logging.getLogger(__name__)


class FeatureMixture(nn.Module):
    r"""Mixture of local Gaussians, and the Mahalanobis distance to the nearest of them.

    The best denoiser :math:`E[f \mid f + \varepsilon]` under a mixture of Gaussians is known in closed form, and the
    distance is what it leaves unexplained: a student that has forgotten nothing rare, which a small network does. Each
    Gaussian has its own mean, a few directions of large variance and one variance for all others (mixture of
    probabilistic principal component analysers: Tipping & Bishop, Neural Computation 11(2), 1999). The features are
    those of all scales, on the grid of the coarsest.

    Only the two Gaussians that would be the likeliest if all were round are looked at, which saves most of the work.

    Args:
        channels (int): Channels of all scales together.
        size (int): Number of Gaussians.
        rank (int): Directions of a Gaussian that have their own variances. Defaults to ``16``.
    """

    def __init__(self, channels: int, size: int, rank: int = 16) -> None:
        super().__init__()
        self.register_buffer("whitening", torch.eye(channels))
        self.register_buffer("means", torch.zeros(size, channels))
        self.register_buffer("round_variances", torch.ones(size))
        self.register_buffer("directions", torch.zeros(size, min(rank, channels - 1), channels))
        self.register_buffer("other_variances", torch.ones(size))
        self.whitening: torch.Tensor
        self.means: torch.Tensor
        self.round_variances: torch.Tensor
        self.directions: torch.Tensor
        self.other_variances: torch.Tensor

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Compute the distance of each position to the nearest Gaussian.

        Args:
            features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a scale.

        Returns:
            torch.Tensor: Squared Mahalanobis distance, mean over channels, of shape ``(B, 1, h, w)`` with the coarsest
                scale's ``h`` and ``w``.
        """
        rows = _rows(features) @ self.whitening
        distances = []
        for index in _likeliest(rows, self.means, self.round_variances, 2):
            difference = rows - self.means[index]
            # The directions are scaled by the share of their variance that the others don't have.
            explained = (self.directions[index] @ difference[:, :, None]).square().sum(dim=(1, 2))
            distances.append((difference.square().sum(dim=1) - explained) / self.other_variances[index])
        batch, _, height, width = features[-1].shape
        return torch.minimum(*distances).reshape(batch, 1, height, width) / rows.shape[1]

    @torch.no_grad()
    def fit(self, batches: Iterable[list[torch.Tensor]], prior: float = 0.35) -> None:
        """Fit the mixture anew: k-means, then hard expectation-maximisation of round Gaussians, then their directions.

        Args:
            batches (Iterable[list[torch.Tensor]]): Standardised features of the training images. Of many positions a
                random part is used, so that many images take no more memory than few.
            prior (float): Weight in a Gaussian's covariance of the average within all Gaussians, in positions a
                channel. Defaults to ``0.35``.
        """
        size, rank, channels = self.directions.shape
        rows, count = _choose(batches, 20_000_000 // channels)
        clusters = KMeans(min(size, len(rows)), n_init=1, max_iter=10, random_state=0).fit(rows.numpy())
        labels = torch.from_numpy(clusters.labels_).long()
        means = torch.from_numpy(clusters.cluster_centers_)
        within = (rows - means[labels]).double()
        covariance = within.mT @ within / len(rows) + 1e-3 * torch.eye(channels, dtype=torch.float64)
        whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)).mT.float()
        rows, means = rows @ whitening, means @ whitening

        weight = prior * channels
        for _ in range(3):
            counts = labels.bincount(minlength=len(means))[:, None]
            sums = torch.zeros_like(means).index_add_(0, labels, rows)
            means = torch.where(counts > 0, sums / counts.clamp_min(1), means)
            squares = (rows - means[labels]).square().mean(dim=1)
            variances = torch.full((len(means),), weight).index_add_(0, labels, squares) / (counts[:, 0] + weight)
            labels = torch.cat([_likeliest(part, means, variances, 1)[0] for part in rows.split(1 << 13)])

        directions, others = torch.zeros(len(means), rank, channels), torch.ones(len(means))
        for number, mean in enumerate(means):
            members = rows[labels == number] - mean
            total = len(members) + weight
            # Rows of zeros, because the decomposition needs as many rows as directions.
            _, singular, basis = torch.svd_lowrank(F.pad(members, (0, 0, 0, max(0, rank - len(members)))), rank)
            own = (singular.square() + weight) / total
            rest = members.square().sum() - singular.square().sum() + weight * (channels - rank)
            others[number] = rest / total / (channels - rank)
            directions[number] = (1 - others[number] / own).clamp_min(0).sqrt()[:, None] * basis.mT
        # With fewer positions than Gaussians, some come repeatedly.
        chosen = torch.arange(size) % len(means)
        self.whitening.copy_(whitening)
        self.means.copy_(means[chosen])
        self.round_variances.copy_(variances[chosen])
        self.directions.copy_(directions[chosen])
        self.other_variances.copy_(others[chosen])
        logger.info("Fitted %d local Gaussians to %d of %d training positions.", len(means), len(rows), count)


def _rows(features: list[torch.Tensor]) -> torch.Tensor:
    """Join all scales on the grid of the coarsest; the result has shape ``(B * h * w, C)``."""
    size = features[-1].shape[-2:]
    joined = [F.interpolate(feature, size=size, mode="bilinear") for feature in features[:-1]]
    return torch.cat([*joined, features[-1]], dim=1).permute(0, 2, 3, 1).flatten(0, 2)


def _choose(batches: Iterable[list[torch.Tensor]], limit: int) -> tuple[torch.Tensor, int]:
    """Return at most ``limit`` rows, each as likely as any other, and the number of all."""
    rows, keys, count = torch.empty(0), torch.empty(0), 0
    generator = torch.Generator().manual_seed(0)  # the same on several devices
    for features in batches:
        new = _rows(features).cpu()
        count += len(new)
        rows = torch.cat([rows, new]) if len(rows) else new
        keys = torch.cat([keys, torch.rand(len(new), generator=generator)])
        if len(rows) > limit:
            kept = keys.topk(limit).indices
            rows, keys = rows[kept], keys[kept]
    return rows, count


def _likeliest(rows: torch.Tensor, means: torch.Tensor, variances: torch.Tensor, count: int) -> torch.Tensor:
    """Return under which round Gaussians each row is the likeliest, of shape ``(count, N)``."""
    precise = means / variances[:, None]
    constant = (precise * means).sum(dim=1) + means.shape[1] * variances.log()
    cost = rows.square().sum(dim=1) / variances[:, None] - 2 * precise @ rows.mT + constant[:, None]
    return cost.topk(count, dim=0, largest=False).indices
