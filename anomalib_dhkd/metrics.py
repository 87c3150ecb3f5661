# SPDX-License-Identifier: Apache-2.0

"""What is measured on test images."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from anomalib.metrics import AUPR, AUPRO, AUROC, AnomalibMetric, Evaluator, F1Max, F1Score
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.classification import binary_roc

from .components.moments import mean_and_variance, moments

logger = logging.getLogger(__name__)

FIELDS = {"image": ["pred_score", "gt_label"], "pixel": ["anomaly_map", "gt_mask"]}
"""Scores and ground truth of a batch."""


def test_metrics() -> list[AnomalibMetric]:
    """Return the metrics of the field.

    Returns:
        list[AnomalibMetric]: AUROC, average precision (``AUPR``), F1 at the best and at the set threshold for images;
            AUROC, AUPRO up to a false-positive rate of 0.3, and F1 at the set threshold for pixels.
    """
    image, image_label = ["pred_score", "gt_label"], ["pred_label", "gt_label"]
    pixel, pixel_label = ["anomaly_map", "gt_mask"], ["pred_mask", "gt_mask"]
    return [
        AUROC(fields=image, prefix="image_"),
        AUPR(fields=image, prefix="image_"),
        F1Max(fields=image, prefix="image_"),
        F1Score(fields=image_label, prefix="image_"),
        AUROC(fields=pixel, prefix="pixel_", strict=False),
        AUPRO(fields=pixel, prefix="pixel_", strict=False),
        F1Score(fields=pixel_label, prefix="pixel_", strict=False),
    ]


def curves(batches: list[Any]) -> dict[str, np.ndarray]:
    """Compute curves on a grid of 201 false-positive rates: ROC up to 1, PRO up to 0.3.

    Args:
        batches (list[Batch]): Predictions of all test images.

    Returns:
        dict[str, np.ndarray]: ``image_ROC``, ``pixel_ROC`` and ``pixel_PRO``, each of shape ``(2, 201)``, without those
            that lack scores or one of the two classes.
    """
    found = {}
    for level, (score, truth) in FIELDS.items():
        if any(getattr(batch, field) is None for batch in batches for field in (score, truth)):
            continue
        scores, truths = (torch.cat([getattr(batch, field).flatten() for batch in batches]) for field in (score, truth))
        if truths.unique().numel() == 2:
            rates, recall, _ = binary_roc(scores.cpu(), truths.cpu().int())
            found[f"{level}_ROC"] = (1.0, rates.numpy(), recall.numpy())
    if "pixel_ROC" in found:
        metric = AUPRO(fields=FIELDS["pixel"])
        for batch in batches:
            metric.update(batch)
        maps = torch.cat([batch.anomaly_map for batch in batches])
        rates, overlaps = metric.compute_pro(metric.perform_cca(), maps)
        found["pixel_PRO"] = (0.3, rates.numpy(), overlaps.numpy())
    grids = {name: np.linspace(0, limit, 201) for name, (limit, *_) in found.items()}
    return {name: np.stack([grids[name], np.interp(grids[name], x, y)]) for name, (_, x, y) in found.items()}


class DefinedEvaluator(Evaluator):
    """anomalib's evaluator, with NaN and a warning for what the test images can't tell.

    The metrics of :func:`test_metrics` compare good with anomalous. Where one of the two is missing, torchmetrics'
    values are those of a perfect or a worthless model, whatever the model does.

    Args:
        **kwargs: Arguments of :class:`anomalib.metrics.Evaluator`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.anomalous: Any = nn.ModuleDict({field: MeanMetric() for field in ("gt_label", "gt_mask")})

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Update the metrics, and the shares of what is anomalous."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, *args, **kwargs)
        for field, share in self.anomalous.items():
            if (truth := getattr(batch, field, None)) is not None:
                share.update(truth.float().mean())

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the metrics, and NaN for those that are undefined."""
        metrics: Any = self.test_metrics
        shares = {field: float(share.compute()) for field, share in self.anomalous.items() if share.update_called}
        defined, undefined = nn.ModuleList(), defaultdict(list)
        for metric in metrics:
            field = metric.fields[-1]
            if shares.get(field) in {0, 1}:
                pl_module.log(metric.name, torch.nan)
                metric.reset()
                undefined[field].append(metric.name)
            else:
                defined.append(metric)
        for field, names in undefined.items():
            logger.warning(
                "All test %s are %s, so these are undefined (nan): %s.",
                {"gt_label": "images", "gt_mask": "pixels"}[field],
                "anomalous" if shares[field] else "good",
                ", ".join(names),
            )
        for share in self.anomalous.values():
            share.reset()
        self.test_metrics = defined  # what anomalib's evaluator logs
        super().on_test_epoch_end(trainer, pl_module)
        self.test_metrics = metrics


class ResponseShift(Metric):
    r"""The paper's objective as a number: how far a network's response moves on anomalies.

    It is the mean squared deviation of the response on anomalies, in variances of the response on good images.

    The abstract asks of the teacher a large, of the student a small difference of the responses to a normal and an
    anomalous image. Real anomalies have no normal twin, so the good images' mean stands for it: with :math:`\mu_c` and
    :math:`\sigma_c^2` the mean and variance of channel :math:`c` over all positions of good images, :math:`E_a` the
    mean over the anomalous positions, and :math:`C` channels in all scales together,

    .. math::
        \frac{1}{C} \sum_c \frac{E_a[(z_c - \mu_c)^2]}{\sigma_c^2} ,

    which is 1 where anomalies change nothing. NaN unless there are good and anomalous positions.

    Args:
        channels (Sequence[int]): Number of channels of each scale.
    """

    full_state_update = False
    good: torch.Tensor
    anomalous: torch.Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        for name in ("good", "anomalous"):
            self.add_state(name, torch.zeros(3, sum(channels)), dist_reduce_fx="sum")

    def update(self, responses: list[torch.Tensor], labels: torch.Tensor, masks: torch.Tensor | None) -> None:
        """Add a batch.

        Args:
            responses (list[torch.Tensor]): Outputs of the network, of shape ``(B, C, h, w)`` a scale.
            labels (torch.Tensor): Whether images are anomalous, of shape ``(B,)``.
            masks (torch.Tensor | None): Anomalous pixels, of shape ``(B, H, W)``; without them every position of an
                anomalous image counts as anomalous.
        """
        good = ~labels.bool()[:, None, None]
        sums = []
        for response in responses:
            grid = response.shape[-2:]
            anomalous = ~good if masks is None else ~good & F.adaptive_max_pool2d(masks.float(), grid).bool()
            values = response.float().movedim(1, -1)
            sums.append([moments(values[where.expand(-1, *grid)]) for where in (good, anomalous)])
        of_good, of_anomalous = (torch.cat(parts, dim=1) for parts in zip(*sums, strict=True))
        self.good += of_good
        self.anomalous += of_anomalous

    def compute(self) -> torch.Tensor:
        """Return the shift, of shape ``()``."""
        mean, variance = mean_and_variance(self.good)
        anomalous_mean, anomalous_variance = mean_and_variance(self.anomalous)
        return ((anomalous_variance + (anomalous_mean - mean).square()) / variance).mean()
