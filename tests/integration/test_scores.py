# SPDX-License-Identifier: Apache-2.0

"""The post-processor on a built-in model: AUROC that users see beside that of the raw scores."""

import copy
from pathlib import Path
from typing import Any

import openvino as ov
import pytest
import torch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.metrics import AUROC
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from sklearn.metrics import roc_auc_score

from anomalib_dhkd import Quickstart, RankPreservingPostProcessor

# Tracing the exporters would more than double their time.
pytestmark = pytest.mark.no_cover

LEVELS = {"image": ("pred_score", "gt_label"), "pixel": ("anomaly_map", "gt_mask")}


def _flat(batches: list[Any], field: str) -> torch.Tensor:
    return torch.cat([getattr(batch, field).flatten() for batch in batches])


def test_auroc_of_normalised_scores_is_that_of_raw_scores(quickstart: Quickstart, tmp_path: Path) -> None:
    """Of PaDiM, whose distances are large: without normalisation the sigmoid in torchmetrics ties them."""
    pre_processor: Any = Padim.configure_pre_processor((128, 128))
    model: Any = Padim(
        "efficientnet_lite0_bundled", ["blocks.2", "blocks.4"], n_features=50, pre_processor=pre_processor
    )
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, enable_progress_bar=False)
    engine.fit(model, quickstart)
    model.eval()
    images, batches = [], []
    for batch in quickstart.test_dataloader():
        images.append(batch.image)
        image, batch.gt_mask = model.pre_processor.transform(batch.image, batch.gt_mask)
        with torch.no_grad():
            batches.append(batch.update(**model.model(image)._asdict()))
    raw = {
        level: roc_auc_score(_flat(batches, truth), _flat(batches, score)) for level, (score, truth) in LEVELS.items()
    }

    def auroc(post_processor: PostProcessor) -> dict[str, float]:
        """Return anomalib's AUROC of images and pixels with a post-processor that has the model's statistics."""
        post_processor.load_state_dict(model.post_processor.state_dict())
        metrics = {level: AUROC(fields=fields) for level, fields in LEVELS.items()}
        for batch in batches:
            processed = copy.copy(batch)
            post_processor.post_process_batch(processed)
            for metric in metrics.values():
                metric.update(processed)
        return {level: metric.compute().item() for level, metric in metrics.items()}

    rank_preserving = RankPreservingPostProcessor()
    assert auroc(rank_preserving) == pytest.approx(raw, abs=1e-6)
    # With normalisation the stock one is wrong only where it clips scores, which it does not on these data.
    assert auroc(PostProcessor(enable_normalization=False))["image"] < raw["image"] - 0.01

    model.post_processor = rank_preserving
    path = engine.export(model, ExportType.OPENVINO, export_root=tmp_path, input_size=(128, 128))
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = [compiled(image.numpy()) for image in images]
    for level, (score, truth) in LEVELS.items():
        values = torch.cat([torch.from_numpy(output[score]).flatten() for output in outputs])
        assert roc_auc_score(_flat(batches, truth), values) == pytest.approx(raw[level], abs=1e-3)
