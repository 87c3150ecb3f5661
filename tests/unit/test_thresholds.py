# SPDX-License-Identifier: Apache-2.0

"""Thresholds of the highest F1 beside anomalib's."""

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import F1AdaptiveThreshold
from sklearn.metrics import f1_score

from anomalib_dhkd.thresholds import PixelThreshold

FIELDS = ["anomaly_map", "gt_mask"]


def _batches(scale: float, share: float) -> list[ImageBatch]:
    """Return maps of both signs whose anomalous pixels tend to be higher."""
    batches = []
    for _ in range(3):
        mask = torch.rand(4, 32, 32) < share
        maps = scale * (torch.randn(4, 32, 32) + 2 * mask)
        batches.append(ImageBatch(image=torch.zeros(4, 3, 32, 32), anomaly_map=maps, gt_mask=mask))
    return batches


@pytest.mark.parametrize("share", [0.001, 0.1, 0.9])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_pixels_threshold_is_anomalibs_but_for_rounding(scale: float, share: float) -> None:
    ours, anomalibs = PixelThreshold(fields=FIELDS), F1AdaptiveThreshold(fields=FIELDS)
    batches = _batches(scale, share)
    for batch in batches:
        ours.update(batch)
        anomalibs.update(batch)
    truth = torch.cat([batch.gt_mask for batch in batches]).flatten()
    values = torch.cat([batch.anomaly_map for batch in batches]).flatten()
    found, best = (f1_score(truth, values >= threshold.compute()) for threshold in (ours, anomalibs))
    assert found == pytest.approx(best, abs=2e-3)
    assert ours.counts.numel() * ours.counts.element_size() == 2**20  # whatever it is given


def test_a_defect_that_stands_out_lies_above_and_the_rest_below() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :2] = True
    maps = torch.where(mask, 3.0, -5.0)
    threshold = PixelThreshold(fields=FIELDS)
    threshold.update(ImageBatch(image=torch.zeros(1, 3, 8, 8), anomaly_map=maps, gt_mask=mask))
    assert threshold.compute() == -1


@pytest.mark.parametrize(("anomalous", "expected"), [(False, 7.123), (True, -70000.0)])
def test_pixels_of_one_class(anomalous: bool, expected: float) -> None:
    maps = torch.tensor([[[7.123, 0.0], [1.0, -70000.0]]])
    threshold = PixelThreshold(fields=FIELDS)
    mask = torch.full((1, 2, 2), anomalous)
    threshold.update(ImageBatch(image=torch.zeros(1, 3, 2, 2), anomaly_map=maps, gt_mask=mask))
    assert threshold.compute() == torch.tensor(expected)
