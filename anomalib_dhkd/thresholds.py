# SPDX-License-Identifier: Apache-2.0

"""Thresholds of the highest F1 on validation images, that of images exact, that of pixels in little memory."""

import torch
from anomalib.metrics import AnomalibMetric, F1AdaptiveThreshold
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

KINDS = 2**16
"""Numbers of half precision."""
LARGEST = torch.finfo(torch.float16).max


class ImageThreshold(F1AdaptiveThreshold):
    """Threshold of the highest F1, halfway between the scores that it separates.

    anomalib's is the lowest score that counts as anomalous. Labels are of scores above the threshold, so that this one
    would lose its own; and in another runtime, rounding would decide.
    """

    def compute(self) -> torch.Tensor:  # type: ignore[override]  # anomalib's is a threshold, torchmetrics' a curve
        """Compute the threshold.

        Returns:
            torch.Tensor: Threshold of shape ``()``; the lowest or highest score if all images are of one class.
        """
        threshold = super().compute()
        scores, targets = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        lower = scores[scores < threshold]
        # The highest good score, where there are no others, already is the threshold that it should be.
        return lower.amax() / 2 + threshold / 2 if len(lower) and targets.any() else threshold


class _CountedThreshold(Metric):
    """Counts scores, rounded to half precision, and so takes the same memory for many as for few."""

    full_state_update = False
    counts: torch.Tensor
    lowest: torch.Tensor
    highest: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, KINDS, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("lowest", torch.tensor(torch.inf), dist_reduce_fx="min")
        self.add_state("highest", torch.tensor(-torch.inf), dist_reduce_fx="max")

    def update(self, scores: torch.Tensor, targets: torch.Tensor) -> None:
        """Count scores of any shape, and whether each is anomalous."""
        scores = scores.float()
        places = _ordered(scores.clamp(-LARGEST, LARGEST).half()) + KINDS * targets.bool().int()
        # Not in place, which a tensor from a validation outside of training (inference mode) doesn't bear in training.
        self.counts = self.counts + places.flatten().bincount(minlength=2 * KINDS).view(2, KINDS)
        self.lowest = torch.minimum(self.lowest, scores.min())
        self.highest = torch.maximum(self.highest, scores.max())

    def compute(self) -> torch.Tensor:
        """Return the threshold, of shape ``()``; the highest or lowest score if all pixels are of one class."""
        good, anomalous = self.counts.flip(1).cumsum(1).flip(1).double()  # at least as high as each number
        if not anomalous[0]:
            return self.highest
        if not good[0]:
            return self.lowest
        f1 = 2 * anomalous / (anomalous + good + anomalous[0])
        scores = self.counts.sum(0).nonzero().flatten()
        best = f1[scores].argmax()
        return (_number(scores[best]) + _number(scores[best - 1])) / 2 if best else self.lowest


class PixelThreshold(AnomalibMetric, _CountedThreshold):  # type: ignore[misc]  # as all of anomalib's metrics
    """Threshold of the highest F1 of pixels, as anomalib's but for one part in two thousand.

    anomalib's keeps each pixel of each map, and takes 4 MB for each image of 320 x 320 pixels.
    """


def _ordered(numbers: torch.Tensor) -> torch.Tensor:
    """Return numbers of half precision as indices from 0 on, in the same order."""
    bits = numbers.view(torch.int16)
    return torch.where(bits < 0, bits ^ 0x7FFF, bits).int() + KINDS // 2


def _number(index: torch.Tensor) -> torch.Tensor:
    """Return the number of an index, in single precision."""
    bits = (index - KINDS // 2).to(torch.int16)
    return torch.where(bits < 0, bits ^ 0x7FFF, bits).view(torch.float16).float()
