# SPDX-License-Identifier: Apache-2.0

"""What is kept of a test for the report: a small picture of each prediction."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.classification import binary_auroc

MAP_SIZE = 64
"""Rows and columns of the heat maps that are kept for the report."""


class PredictionRecorder(Callback):
    """Keeps the predictions of a test, without the images."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args, **kwargs) -> None:
        """Keep a batch, which anomalib's post-processor changes afterwards in place."""
        del trainer, pl_module, args, kwargs  # Unused arguments.
        outputs.image = outputs.image[:, :, :1, :1]
        self.batches.append(outputs)


def small(images: torch.Tensor, size: int = MAP_SIZE) -> np.ndarray:
    """Return images of ``N x H x W`` values in [0, 1] as bytes of shape ``(N, size, size)``."""
    images = F.interpolate(images.reshape(len(images), 1, *images.shape[-2:]).float(), (size, size), mode="area")
    return (255 * images[:, 0]).round().to(torch.uint8).cpu().numpy()


def predictions(batches: list[Any]) -> dict[str, np.ndarray]:
    """Return what the report shows of each test image.

    Args:
        batches (list[Batch]): Predictions of all test images.

    Returns:
        dict[str, np.ndarray]: For ``N`` images ``path``, ``label``, ``score``; ``map`` and ``mask`` of shape
            ``(N, 64, 64)`` with values 0 to 255; ``auroc``, each image's own pixel AUROC, not a number for good ones.
    """
    rows: dict[str, list[Any]] = {name: [] for name in ("path", "label", "score", "map", "mask", "auroc")}
    for batch in batches:
        rows["path"].append(np.array(batch.image_path))
        rows["label"].append(batch.gt_label.cpu().numpy())
        rows["score"].append(batch.pred_score.flatten().cpu().numpy())
        rows["map"].append(small(batch.anomaly_map))
        rows["mask"].append(small(batch.gt_mask))
        rows["auroc"].append(
            [
                binary_auroc(scores.flatten(), mask.flatten().int()).item() if mask.any() and not mask.all() else np.nan
                for mask, scores in zip(batch.gt_mask, batch.anomaly_map, strict=True)
            ]
        )
    return {name: np.concatenate(values) for name, values in rows.items()}
