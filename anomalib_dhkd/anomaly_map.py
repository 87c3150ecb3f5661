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
        m = \frac{1}{\sum_k w_k} \sum_k w_k \operatorname{upsample}\left(\frac{\log d_k - \mu_k}{\sigma_k}\right) .

    Maps are averaged, and image scores read off, at the resolution of the first, finest one, to which coarser ones are
    enlarged by cubic interpolation, because linear interpolation flattens their peaks; the result is enlarged to the
    image linearly. The rule was chosen by measurement, see ``docs/scores.md`` and ``docs/results.md``.

    Args:
        weights (Sequence[float]): Weight of each distance map.
        calibration (bool): With ``False`` the map is the weighted mean of the distances themselves.
        image_score (str): ``"mean"`` or ``"max"`` of the averaged maps; ``"topk"``, the mean of the highest
            hundredth of their positions; or ``"contrast"``, the same less half of the mean, because what raises a whole
            image, like its light, is seldom its defect.
    """

    def __init__(self, weights: Sequence[float], calibration: bool, image_score: str) -> None:
        super().__init__()
        self.weights = [weight / sum(weights) for weight in weights]
        self.calibration = calibration
        self.image_score = image_score
        self.register_buffer("log_mean", torch.zeros(len(weights)))
        self.register_buffer("log_std", torch.ones(len(weights)))
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
        maps = [resize(distance, height, width, "bicubic") for distance in distances]
        averaged = torch.stack([weight * part for weight, part in zip(self.weights, maps, strict=True)]).sum(dim=0)
        anomaly_map = resize(averaged, *image_size)
        values = averaged.flatten(1)
        if self.image_score == "mean":
            score = values.mean(dim=1, keepdim=True)
        elif self.image_score == "max":
            score = values.amax(dim=1, keepdim=True)
        else:
            score = values.topk(max(1, values.shape[1] // 100), dim=1).values.mean(dim=1, keepdim=True)
            if self.image_score == "contrast":
                score = score - values.mean(dim=1, keepdim=True) / 2
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=score)

    def fit(self, distances: Iterable[list[torch.Tensor]]) -> None:
        """Take the statistics of the maps.

        Args:
            distances (Iterable[list[torch.Tensor]]): Maps of the training images as in :meth:`forward`, a list a batch;
                they are used one after the other, so that many images take no more memory than few.
        """
        # In double precision: the variance is a difference of large sums.
        count = 0
        sums = torch.zeros(2, len(self.log_mean), dtype=torch.float64)
        for maps in distances:
            count += len(maps[0])
            for index, distance in enumerate(maps):
                logs = _log(distance.cpu().double())
                moments = torch.cat([logs, logs.square()], dim=1).mean(dim=(2, 3))
                sums[:, index] += moments.sum(dim=0)
        mean, square = sums / count
        self.log_mean.copy_(mean)
        self.log_std.copy_((square - mean.square()).clamp_min(1e-12).sqrt())  # 0 if all distances are the same


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
