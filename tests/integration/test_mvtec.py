# SPDX-License-Identifier: Apache-2.0

"""The README's commands on real MVTec AD images: `make test-mvtec`. Trains for many minutes a category."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from anomalib_dhkd import Dhkd, MVTec
from tests.conftest import REPOSITORY

ROOT = Path(os.environ.get("MVTEC_ROOT", REPOSITORY.parent / "shared" / "data" / "mvtec_ad"))

pytestmark = [
    pytest.mark.mvtec,
    pytest.mark.skipif(not ROOT.is_dir(), reason=f"no MVTec AD images at {ROOT}; set MVTEC_ROOT"),
]


@pytest.mark.parametrize(
    ("category", "image_auroc", "pixel_auroc"),
    [("bottle", 0.99, 0.95), ("grid", 0.99, 0.95), ("screw", None, None)],
)
def test_train_and_export(
    category: str,
    image_auroc: float | None,
    pixel_auroc: float | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    def anomalib(*arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("anomalib")), *arguments]
        completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]

    start = time.monotonic()
    data = ["--data", "MVTec", "--data.root", str(ROOT), "--data.category", category]
    anomalib("train", "--model", "anomalib_dhkd.Dhkd", *data, "--seed_everything", "0")
    minutes = (time.monotonic() - start) / 60
    results = tmp_path / "results" / "Dhkd" / "MVTec" / category / "latest"
    checkpoint = results / "weights" / "lightning" / "model.ckpt"
    model = Dhkd.load_from_checkpoint(checkpoint).eval()
    datamodule = MVTec(root=ROOT, category=category, num_workers=0)
    datamodule.setup()
    assert len(list((results / "images").rglob("*.png"))) == len(datamodule.test_data)

    # anomalib's own metrics see clamped scores; these are the model's raw ones.
    images, masks, scores, maps, labels = [], [], [], [], []
    resize = model.pre_processor.transform
    for batch in DataLoader(datamodule.test_data, batch_size=16, collate_fn=datamodule.test_data.collate_fn):
        with torch.no_grad():
            output = model.model(resize(batch.image))
        images.extend(batch.image)
        masks.append(resize(batch.gt_mask[:, None].float())[:, 0] > 0.5)
        scores.append(output.pred_score.squeeze(1))
        maps.append(output.anomaly_map.squeeze(1))
        labels.append(batch.gt_label)
    image = roc_auc_score(torch.cat(labels), torch.cat(scores))
    pixel = roc_auc_score(torch.cat(masks).flatten(), torch.cat(maps).flatten())

    anomalib("export", "--model", "anomalib_dhkd.Dhkd", "--export_type", "openvino", "--ckpt_path", str(checkpoint))
    (path,) = tmp_path.rglob("model.xml")
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    largest = 0.0
    for picture in images:
        with torch.no_grad():
            expected = model(picture[None])
        outputs = compiled(picture[None].numpy())
        for name in ("pred_score", "anomaly_map"):
            largest = max(largest, float(np.abs(outputs[name] - getattr(expected, name).numpy()).max()))
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{category}: raw image AUROC {image:.4f}, pixel AUROC {pixel:.4f}, {minutes:.1f} min, "
            f"largest difference of OpenVINO and torch {largest:.1e}"
        )
    assert largest <= 1e-3
    assert image_auroc is None or image >= image_auroc
    assert pixel_auroc is None or pixel >= pixel_auroc
