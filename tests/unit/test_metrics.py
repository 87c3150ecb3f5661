# SPDX-License-Identifier: Apache-2.0

"""Tests of the response shift, and of metrics that the test images can't tell."""

import logging
import math
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from anomalib_dhkd import metrics
from anomalib_dhkd.metrics import DefinedEvaluator, ResponseShift


def test_equals_its_formula_over_batches() -> None:
    responses = torch.randn(6, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 5
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    masks = torch.zeros(6, 16, 16, dtype=torch.bool)
    masks[1, :8, :4] = True  # 2 x 1 positions
    masks[3, 15, 15] = True  # one pixel is enough for its position
    responses[1, :, :2, 0] += 4
    shift, two_scales = ResponseShift([3]), ResponseShift([3, 3])
    for part in (slice(0, 2), slice(2, 6)):
        shift.update([responses[part]], labels[part], masks[part])
        two_scales.update([responses[part], 7 * responses[part] + 1], labels[part], masks[part])
    good = responses[labels == 0].movedim(1, -1).reshape(-1, 3)
    anomalous = torch.cat([responses[1, :, :2, 0].T, responses[3, :, 3, 3][None]])
    expected = ((anomalous - good.mean(0)).square().mean(0) / good.var(0, correction=0)).mean()
    torch.testing.assert_close(shift.compute(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(two_scales.compute(), expected, rtol=1e-3, atol=0)


def test_is_one_where_anomalies_change_nothing_and_nan_without_them() -> None:
    responses = torch.randn(400, 2, 4, 4)
    shift = ResponseShift([2])
    shift.update([responses], torch.arange(400) % 2, None)
    assert shift.compute() == pytest.approx(1, abs=0.05)
    shift.reset()
    shift.update([responses], torch.zeros(400), None)
    assert shift.compute().isnan()


class _Scores(LightningModule):
    """Scores and maps that are the truth."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluator = DefinedEvaluator(test_metrics=metrics.test_metrics())

    def configure_callbacks(self) -> list[DefinedEvaluator]:
        return [self.evaluator]

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        batch.pred_score, batch.pred_label = batch.gt_label.float(), batch.gt_label
        if batch.gt_mask is not None:
            batch.anomaly_map, batch.pred_mask = batch.gt_mask.float(), batch.gt_mask


def _logged(folder: Path, labels: list[int], masks: bool = True) -> list[dict[str, float]]:
    """Return what two tests, one after another, log of images of a batch each."""
    masks_of = torch.zeros(len(labels), 8, 8)
    masks_of[torch.tensor(labels).bool(), :4] = 1
    batches = [
        ImageBatch(torch.zeros(1, 3, 8, 8), torch.tensor([label]), gt_mask=mask[None] if masks else None)
        for label, mask in zip(labels, masks_of, strict=True)
    ]
    model = _Scores()
    trainer = Trainer(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu")
    loader = DataLoader(batches, batch_size=None)
    return [trainer.test(model, loader, verbose=False)[0] for _ in range(2)]


def test_metrics_are_told_where_there_are_both(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for logged in _logged(tmp_path, [0, 1, 0]):
        assert len(logged) == 7
        assert set(logged.values()) == {1.0}
    assert "undefined" not in caplog.text


@pytest.mark.parametrize(
    ("labels", "word", "pixels"),
    [([0, 0], "good", {"pixel_AUROC", "pixel_AUPRO", "pixel_F1Score"}), ([1, 1], "anomalous", set())],
)
def test_metrics_are_nan_where_one_is_missing(
    labels: list[int], word: str, pixels: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        both = _logged(tmp_path, labels)
    for logged in both:
        undefined = {name for name, value in logged.items() if math.isnan(value)}
        assert len(logged) == 7
        assert undefined == {"image_AUROC", "image_AUPR", "image_F1Max", "image_F1Score"} | pixels
    message = (
        "All test images are {}, so these are undefined (nan): image_AUROC, image_AUPR, image_F1Max, image_F1Score."
    )
    assert message.format(word) in caplog.text
    assert ("All test pixels are good" in caplog.text) == bool(pixels)


def test_metrics_of_pixels_are_left_out_without_masks(tmp_path: Path) -> None:
    for logged in _logged(tmp_path, [0, 0], masks=False):
        assert set(logged) == {"image_AUROC", "image_AUPR", "image_F1Max", "image_F1Score"}
