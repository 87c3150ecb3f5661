# SPDX-License-Identifier: Apache-2.0

"""Compare the AUROC that users see with that of the raw scores.

python -m anomalib_dhkd.benchmark.scores --root path/to/mvtec_ad

All models use the same backbone. All but PaDiM, which needs one pass, are trained briefly, because the size of the
scores matters here and not their quality.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openvino as ov
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.metrics import AUROC
from anomalib.post_processing import PostProcessor
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from sklearn.metrics import roc_auc_score

from anomalib_dhkd import MVTec, RankPreservingPostProcessor

from .models import create, make_exportable

EPOCHS = {"Dhkd": 6, "Padim": 1, "Cflow": 1, "Stfpm": 2}
LEVELS = {"image": ("pred_score", "gt_label"), "pixel": ("anomaly_map", "gt_mask")}


def compare(name: str, datamodule: AnomalibDataModule, results_dir: Path) -> pd.DataFrame:
    """Train a model and compute its AUROC in every way.

    Args:
        name (str): A key of ``EPOCHS``.
        datamodule (AnomalibDataModule): Images.
        results_dir (Path): Folder for the checkpoint and the exported model.

    Returns:
        pd.DataFrame: One row for the image and one for the pixel level.
    """
    seed_everything(0, workers=True)
    model: Any = create(name)
    epochs = EPOCHS[name]
    engine = Engine(
        default_root_dir=results_dir,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        enable_progress_bar=False,
    )
    engine.fit(model, datamodule)
    model.eval()
    originals, batches = [], []
    for batch in datamodule.test_dataloader():
        originals.append(batch.image)
        image, batch.gt_mask = model.pre_processor.transform(batch.image, batch.gt_mask)
        with torch.no_grad():
            prediction = model.model(image)
        batch.image = image[:, :, :1, :1]  # no longer needed, and large
        batches.append(batch.update(**prediction._asdict()))

    table = pd.DataFrame({"model": name, "category": datamodule.category, "level": list(LEVELS)}, index=list(LEVELS))
    for level, (score, truth) in LEVELS.items():
        truths, values = (torch.cat([getattr(batch, field).flatten() for batch in batches]) for field in (truth, score))
        table.loc[level, "scikit-learn"] = roc_auc_score(truths, values)
    for column, post_processor in (
        ("stock", PostProcessor()),
        ("stock, normalisation off", PostProcessor(enable_normalization=False)),
        ("rank-preserving", RankPreservingPostProcessor()),
    ):
        post_processor.load_state_dict(model.post_processor.state_dict())
        processed = [copy.copy(batch) for batch in batches]
        for batch in processed:
            post_processor.post_process_batch(batch)
        for level, fields in LEVELS.items():
            metric = AUROC(fields=fields)
            for batch in processed:
                metric.update(batch)
            table.loc[level, column] = metric.compute().item()

    model.post_processor = post_processor  # the last one
    make_exportable(model)
    path = engine.export(model, ExportType.OPENVINO, export_root=results_dir / name / datamodule.category)
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    # The same batches: CFlow's scores depend on the other images of a batch.
    outputs = [compiled(images.numpy()) for images in originals]
    for level, (score, truth) in LEVELS.items():
        truths = torch.cat([getattr(batch, truth).flatten() for batch in batches])
        values = torch.cat([torch.from_numpy(output[score]).flatten() for output in outputs])
        table.loc[level, "rank-preserving, OpenVINO"] = roc_auc_score(truths, values)
    return table


def markdown(table: pd.DataFrame) -> str:
    """Return the table with AUROC of the raw scores in per cent, and by how many points the others differ."""
    raw = 100 * table["scikit-learn"]
    columns = {"scikit-learn, raw": raw.map("{:.2f}".format)}
    for column in table.columns[4:]:
        number = "{:+.2f}" if column.startswith("stock") else "{:+.1e}"
        columns[column] = (100 * table[column] - raw).map(number.format)
    return table.iloc[:, :3].assign(**columns).to_markdown(index=False, disable_numparse=True)


def main(
    root: Path,
    models: Sequence[str] = tuple(EPOCHS),
    categories: Sequence[str] = ("bottle", "grid", "screw"),
    results_dir: Path = Path("results/scores"),
) -> None:
    """Write and print the table; what an earlier call has finished is kept.

    Args:
        root: Folder of MVTec AD.
        models: Names of models.
        categories: Names of categories.
        results_dir: Folder for the table, checkpoints and exported models.
    """
    results_dir.mkdir(parents=True, exist_ok=True)
    tables = []
    for name in models:
        for category in categories:
            file = results_dir / f"{name}_{category}.csv"
            if not file.exists():
                compare(name, MVTec(root=root, category=category), results_dir).to_csv(file, index=False)
            tables.append(pd.read_csv(file))
    table = pd.concat(tables)
    table.to_csv(results_dir / "scores.csv", index=False)
    print(markdown(table))  # noqa: T201


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
