# SPDX-License-Identifier: Apache-2.0

"""Mixture of local Gaussians over normal features."""

import logging
from collections.abc import Iterable

import torch
from sklearn.cluster import KMeans, kmeans_plusplus
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .seeding import seeded

logger = logging.getLogger(__name__)

MAX_VALUES = 20_000_000
"""Feature values at most that a mixture is fitted to; more would need more memory."""
SEEDING_POSITIONS = 32
"""Positions a Gaussian among which k-means looks for its first centres; all would take most of its time."""


class FeatureMixture(nn.Module):
    r"""Mixture of local Gaussians, and the Mahalanobis distance to the nearest of them.

    The best denoiser :math:`E[f \mid f + \varepsilon]` under a mixture of Gaussians is known in closed form, and the
    distance is what it leaves unexplained: a student that has forgotten nothing rare, which a small network does. Each
    Gaussian has its own mean, a few directions of large variance and one variance for all others (mixture of
    probabilistic principal component analysers: Tipping & Bishop, Neural Computation 11(2), 1999). The features are
    those of all scales, on the grid of the coarsest.

    Only the three Gaussians that would be the likeliest if all were round are looked at, which saves most of the work.
    Where the third and the fourth are equally likely, round-off decides between them: in another runtime or on another
    device, the same weights then give another distance at single positions.

    Args:
        channels (int): Channels of all scales together.
        num_gaussians (int): Number of Gaussians.
        rank (int): Directions of a Gaussian that have their own variances. Defaults to ``12``.
    """

    def __init__(self, channels: int, num_gaussians: int, rank: int = 12) -> None:
        super().__init__()
        self.register_buffer("whitening", torch.eye(channels))
        self.register_buffer("means", torch.zeros(num_gaussians, channels))
        self.register_buffer("round_variances", torch.ones(num_gaussians))
        self.register_buffer("directions", torch.zeros(num_gaussians, min(rank, channels - 1), channels))
        self.register_buffer("other_variances", torch.ones(num_gaussians))
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
        distances, _ = self._candidates(rows)
        batch, _, height, width = features[-1].shape
        return distances.amin(dim=0).reshape(batch, 1, height, width) / rows.shape[1]

    def nearest(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Find the Gaussian that :meth:`forward` takes the distance of each position to.

        Args:
            features (list[torch.Tensor]): See :meth:`forward`.

        Returns:
            torch.Tensor: Indices of Gaussians, of shape ``(B, h, w)``.
        """
        distances, indices = self._candidates(_rows(features) @ self.whitening)
        batch, _, height, width = features[-1].shape
        return indices.gather(0, distances.argmin(dim=0, keepdim=True)).reshape(batch, height, width)

    def _candidates(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return squared distances of whitened rows to their candidates, and which they are; shape ``(3, N)`` each."""
        precise = self.means / self.round_variances[:, None]
        constant = (precise * self.means).sum(dim=1) + rows.shape[1] * self.round_variances.log()
        cost = rows.square().sum(dim=1) / self.round_variances[:, None] - 2 * precise @ rows.mT + constant[:, None]
        indices = cost.topk(min(3, len(cost)), dim=0, largest=False).indices
        distances = []
        for index in indices:
            difference = rows - self.means.index_select(0, index)
            # The directions are scaled by the share of their variance that the others don't have.
            explained = (self.directions.index_select(0, index) @ difference[:, :, None]).square().sum(dim=(1, 2))
            distances.append((difference.square().sum(dim=1) - explained) / self.other_variances.index_select(0, index))
        return torch.stack(distances), indices

    @torch.no_grad()
    def fit(self, batches: Iterable[list[torch.Tensor]], prior: float = 0.35, floor: float = 0.25) -> None:
        """Fit the mixture anew: k-means, then hard expectation-maximisation.

        Args:
            batches (Iterable[list[torch.Tensor]]): Standardised features of the training images. Of many positions a
                random part is used, so that many images take no more memory than few.
            prior (float): Weight in a Gaussian's covariance of the average within all Gaussians, in positions a
                channel. Defaults to ``0.35``.
            floor (float): Variance that is added in every direction, as a share of the mean variance within the
                Gaussians. In directions where training images hardly vary, a distance measures light and noise more
                than defects. Defaults to ``0.25``.
        """
        device = self.means.device
        self.cpu()  # where many small decompositions take less time
        size, _, channels = self.directions.shape
        rows, count = _choose(batches, MAX_VALUES // channels)
        some = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: SEEDING_POSITIONS * size]]
        centres, _ = kmeans_plusplus(some.numpy(), min(size, len(rows)), random_state=0)
        clusters = KMeans(len(centres), init=centres, n_init=1, max_iter=10).fit(rows.numpy())
        labels, means = torch.from_numpy(clusters.labels_).long(), torch.from_numpy(clusters.cluster_centers_)
        within = (rows - means[labels]).double()
        covariance = within.mT @ within / len(rows)
        # The constant keeps constant features from dividing by 0.
        covariance.diagonal().add_(floor * covariance.diagonal().mean() + 1e-3)
        self.whitening.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)).mT)
        rows = rows @ self.whitening
        # With fewer positions than Gaussians, some start at the same.
        self.means.copy_((means @ self.whitening)[torch.arange(size) % len(means)])
        log_determinants = self._maximise(rows, labels, prior * channels)
        for _ in range(3):
            labels = torch.cat([self._likeliest(part, log_determinants) for part in rows.split(1 << 12)])
            log_determinants = self._maximise(rows, labels, prior * channels)
        self.to(device)
        logger.info("Fitted %d local Gaussians to %d of %d training positions.", size, len(rows), count)

    def _likeliest(self, rows: torch.Tensor, log_determinants: torch.Tensor) -> torch.Tensor:
        """Return under which Gaussian each of ``N`` whitened rows is the likeliest, of shape ``(N,)``."""
        distances, indices = self._candidates(rows)
        costs = distances + log_determinants[indices]
        return indices.gather(0, costs.argmin(dim=0, keepdim=True))[0]

    def _maximise(self, rows: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
        """Take over each Gaussian's mean and variances from its whitened rows; return the log-determinants."""
        size, rank, channels = self.directions.shape
        log_determinants = torch.zeros(size)
        for number, members in enumerate(rows[labels.argsort()].split(labels.bincount(minlength=size).tolist())):
            if len(members):
                self.means[number] = members.mean(dim=0)
            difference = members - self.means[number]
            total = len(members) + weight
            squares = difference.square().sum()
            # Rows of zeros, because the decomposition needs as many rows as directions.
            padded = F.pad(difference, (0, 0, 0, max(0, rank - len(members))))
            with seeded(0):  # the same on several devices, and in a resumed run
                _, singular, basis = torch.svd_lowrank(padded, rank)
            own = (singular.square() + weight) / total
            others = (squares - singular.square().sum() + weight * (channels - rank)) / total / (channels - rank)
            self.round_variances[number] = (squares / channels + weight) / total
            self.directions[number] = (1 - others / own).clamp_min(0).sqrt()[:, None] * basis.mT
            self.other_variances[number] = others
            log_determinants[number] = own.log().sum() + (channels - rank) * others.log()
        return log_determinants


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
