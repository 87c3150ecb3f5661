# SPDX-License-Identifier: Apache-2.0

"""Fusion of distance maps into one anomaly map and one image score."""

from collections.abc import Iterable, Sequence

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class AnomalyMapGenerator(nn.Module):
    r"""Calibrate maps on training statistics, then average them in the log domain.

    Distances of different scales differ in size, and a scale's anomalies differ by orders of magnitude; summed raw, the
    scale with the largest energy drowns the others. With :math:`d_k` the :math:`k`-th distance map, :math:`w_k` its
    weight, and :math:`\mu_k`, :math:`\sigma_k` the mean and standard deviation of :math:`\log d_k` over the training
    images, the anomaly map is

    .. math::
        m = \sum_k w_k \operatorname{upsample}\left(\frac{\log d_k - \mu_k}{\sigma_k}\right) .

    The image score is read off the same sum with weights of its own. Maps are summed, and image scores read off, at the
    resolution of the first, finest one; only the result is enlarged to the image. The rule was chosen by measurement,
    see ``docs/scores.md`` and ``docs/results.md``.

    Args:
        map_weights (Sequence[float]): Weight of each distance map in the anomaly map.
        score_weights (Sequence[float]): Weight of each distance map in the image score.
        calibration (bool): With ``False`` the maps are the plain weighted sums of the distances.
        image_score (str): ``"mean"`` or ``"max"`` of the summed maps, or ``"topk"``, the mean of the highest half per
            cent of their positions.
    """

    def __init__(
        self,
        map_weights: Sequence[float],
        score_weights: Sequence[float],
        calibration: bool,
        image_score: str,
    ) -> None:
        super().__init__()
        self.map_weights = tuple(map_weights)
        self.score_weights = tuple(score_weights)
        self.calibration = calibration
        self.image_score = image_score
        self.register_buffer("log_mean", torch.zeros(len(self.map_weights)))
        self.register_buffer("log_std", torch.ones(len(self.map_weights)))
        self.log_mean: torch.Tensor
        self.log_std: torch.Tensor

    def forward(self, distances: list[torch.Tensor], image_size: tuple[int, int]) -> InferenceBatch:
        """Fuse the maps.

        Args:
            distances (list[torch.Tensor]): Maps of values of at least 0, each of shape ``(B, 1, h, w)``, a finest one
                first.
            image_size (tuple[int, int]): Height and width of the result.

        Returns:
            InferenceBatch: ``anomaly_map`` of shape ``(B, 1, *image_size)`` and ``pred_score`` of shape ``(B, 1)``.
        """
        if self.calibration:
            distances = [
                (_log(distance) - self.log_mean[index]) / self.log_std[index]
                for index, distance in enumerate(distances)
            ]
        height, width = distances[0].shape[-2:]
        maps = [resize(distance, height, width) for distance in distances]
        anomaly_map = resize(_weighted_sum(maps, self.map_weights), *image_size)
        values = _weighted_sum(maps, self.score_weights).flatten(1)
        if self.image_score == "mean":
            score = values.mean(dim=1, keepdim=True)
        elif self.image_score == "max":
            score = values.amax(dim=1, keepdim=True)
        else:
            score = values.topk(max(1, values.shape[1] // 200), dim=1).values.mean(dim=1, keepdim=True)
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=score)

    def fit(self, distances: Iterable[list[torch.Tensor]]) -> None:
        """Take the statistics of the maps.

        Perfect matches are left out: those of the positions that are in the memory say nothing about new images.

        Args:
            distances (Iterable[list[torch.Tensor]]): Maps of the training images as in :meth:`forward`, a list a batch;
                they are used one after the other, so that many images take no more memory than few.
        """
        # In double precision: the variance is a difference of large sums.
        sums = torch.zeros(3, len(self.log_mean), dtype=torch.float64)
        for maps in distances:
            for index, distance in enumerate(maps):
                logs = _log(distance[distance > _PERFECT_MATCH].cpu().double())
                sums[:, index] += torch.stack([torch.ones_like(logs), logs, logs.square()]).sum(dim=1)
        count, *moments = sums
        mean, square = (moment / count.clamp_min(1) for moment in moments)
        variance = (square - mean.square()).clamp_min(0)
        self.log_mean.copy_(mean)
        self.log_std.copy_(torch.where(variance > 1e-9, variance, 1).sqrt())  # all the same, or none


def resize(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Interpolate maps bilinearly, as ``torch.nn.functional.interpolate`` does, by two matrix products.

    For maps of one channel, OpenVINO's interpolation takes ten times as long as the products.

    Args:
        maps (torch.Tensor): Maps of shape ``(..., h, w)``.
        height (int): Rows of the result.
        width (int): Columns of the result.

    Returns:
        torch.Tensor: Maps of shape ``(..., height, width)``.
    """
    if maps.shape[-2:] == (height, width):
        return maps
    rows, columns = (
        F.interpolate(torch.eye(old, dtype=maps.dtype, device=maps.device)[None], size=new, mode="linear")[0]
        for old, new in zip(maps.shape[-2:], (height, width), strict=True)
    )
    return rows.mT @ maps @ columns


def _weighted_sum(maps: list[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    return torch.stack([weight * part for part, weight in zip(maps, weights, strict=True) if weight]).sum(dim=0)


_PERFECT_MATCH = 1e-4
"""Distance below which two features are the same but for rounding, far below what training reaches otherwise."""


def _log(distance: torch.Tensor) -> torch.Tensor:
    return distance.clamp_min(_PERFECT_MATCH).log()
