# SPDX-License-Identifier: Apache-2.0

"""Fusion of distance maps into one anomaly map and one image score."""

from collections.abc import Iterable

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .components.moments import mean_and_variance, moments


class AnomalyMapGenerator(nn.Module):
    r"""Calibrate maps on training statistics, then average them in the log domain.

    Distances of different scales differ in size, and a scale's anomalies differ by orders of magnitude; summed raw, the
    scale with the largest energy drowns the others. With :math:`d_k` the :math:`k`-th distance map, :math:`w_k` its
    weight, and :math:`\mu_k`, :math:`\sigma_k` the mean and standard deviation of :math:`\log d_k` over the training
    images, the anomaly map is

    .. math::
        m = \sum_k w_k \operatorname{upsample}\left(\frac{\log d_k - \mu_k}{\sigma_k}\right) .

    Maps are averaged, and image scores read off, at the resolution of the first, finest one, to which coarser ones are
    enlarged by cubic interpolation, because linear interpolation flattens their peaks; the result is enlarged to the
    image linearly. The rule was chosen by measurement, see ``docs/log``.

    Args:
        weights (dict[str, float]): Weight of each distance map by its name, a finest map first; their sum is 1.
        image_score (str): ``"mean"`` or ``"max"`` of the averaged maps; ``"topk"``, the mean of the highest
            hundredth of their positions; or ``"contrast"``, the same less a third of the mean where that is above 0,
            the training images' own: what raises a whole image, like its light, is seldom its defect. Less half of it
            would miss defects that are large.
    """

    def __init__(self, weights: dict[str, float], image_score: str) -> None:
        super().__init__()
        self.weights = weights
        self.image_score = image_score
        self.register_buffer("log_mean", torch.zeros(len(weights)))
        self.register_buffer("log_std", torch.ones(len(weights)))
        self.log_mean: torch.Tensor
        self.log_std: torch.Tensor

    def forward(self, distances: dict[str, torch.Tensor], image_size: tuple[int, int]) -> InferenceBatch:
        """Fuse the maps.

        Args:
            distances (dict[str, torch.Tensor]): Maps of values of at least 0 by the names of the weights, each of shape
                ``(B, 1, h, w)``.
            image_size (tuple[int, int]): Height and width of the result.

        Returns:
            InferenceBatch: ``anomaly_map`` of shape ``(B, 1, *image_size)`` and ``pred_score`` of shape ``(B, 1)``.
        """
        averaged = torch.stack(list(self.parts(distances).values())).sum(dim=0)
        return InferenceBatch(anomaly_map=resize(averaged, *image_size), pred_score=self._score(averaged.flatten(1)))

    def parts(self, distances: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Calibrate and weight each map; the averaged map is their sum.

        Args:
            distances (dict[str, torch.Tensor]): See :meth:`forward`.

        Returns:
            dict[str, torch.Tensor]: Maps of the first one's shape by their names.
        """
        parts: dict[str, torch.Tensor] = {}
        height, width = distances[next(iter(self.weights))].shape[-2:]
        for index, (name, weight) in enumerate(self.weights.items()):
            calibrated = (_log(distances[name]) - self.log_mean[index]) / self.log_std[index]
            parts[name] = weight * resize(calibrated, height, width, "bicubic")
        return parts

    def _score(self, values: torch.Tensor) -> torch.Tensor:
        """Read image scores of shape ``(B, 1)`` off averaged maps of shape ``(B, N)``."""
        if self.image_score == "mean":
            return values.mean(dim=1, keepdim=True)
        if self.image_score == "max":
            return values.amax(dim=1, keepdim=True)
        highest = values.topk(max(1, values.shape[1] // 100), dim=1).values.mean(dim=1, keepdim=True)
        if self.image_score == "topk":
            return highest
        return highest - values.mean(dim=1, keepdim=True).clamp_min(0) / 3

    def fit(self, distances: Iterable[dict[str, torch.Tensor]]) -> None:
        """Take the statistics of the maps.

        Args:
            distances (Iterable[dict[str, torch.Tensor]]): Maps of the training images as in :meth:`forward`, a batch
                after the other, so that many images take no more memory than few.
        """
        sums = torch.zeros(len(self.weights), 3, 1, dtype=torch.float64)
        for maps in distances:
            sums += torch.stack([moments(_log(maps[name]).cpu().double().reshape(-1, 1)) for name in self.weights])
        for index, total in enumerate(sums):
            mean, variance = mean_and_variance(total)
            self.log_mean[index] = mean.item()
            self.log_std[index] = variance.clamp_min(1e-12).sqrt().item()  # 0 if all distances are the same


def resize(maps: torch.Tensor, height: int, width: int, mode: str = "bilinear") -> torch.Tensor:
    """Interpolate maps as ``torch.nn.functional.interpolate`` does, by two matrix products.

    For maps of one channel, OpenVINO's interpolation takes ten times as long as the products.

    Args:
        maps (torch.Tensor): Maps of shape ``(..., h, w)``.
        height (int): Rows of the result.
        width (int): Columns of the result.
        mode (str): ``"bilinear"`` or ``"bicubic"``. Defaults to ``"bilinear"``.

    Returns:
        torch.Tensor: Maps of shape ``(..., height, width)``.
    """
    if maps.shape[-2:] == (height, width):
        return maps
    rows, columns = (
        F.interpolate(torch.eye(old).to(maps)[None, None], size=(old, new), mode=mode)[0, 0]
        for old, new in zip(maps.shape[-2:], (height, width), strict=True)
    )
    return rows.mT @ maps @ columns


def _log(distance: torch.Tensor) -> torch.Tensor:
    # A perfect match has distance 0; the bound lies far below any that training reaches.
    return distance.clamp_min(1e-6).log()
