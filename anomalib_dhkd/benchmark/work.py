# SPDX-License-Identifier: Apache-2.0

"""What a job of the benchmark does, in a process of its own: ``python -m anomalib_dhkd.benchmark.work <folder>``.

The process reads ``job.yaml`` in the folder and writes ``result.json`` there when all is done. A process of its own
makes peak memory the job's own, and a crash in a library the end of this job only.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anomalib.data  # lets jsonargparse find data modules by their short names
import anomalib.models  # noqa: F401  # likewise models
import numpy as np
import openvino as ov
import torch
import yaml
from anomalib.data import AnomalibDataModule
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max
from anomalib.models.components import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import Timer
from sklearn.metrics import roc_auc_score, roc_curve
from torch.nn import functional as F  # noqa: N812

from anomalib_dhkd import RankPreservingPostProcessor

from .models import make_exportable
from .speed import compare_inference, peak_memory

logger = logging.getLogger(__name__)

FIELDS = {"image": ["pred_score", "gt_label"], "pixel": ["anomaly_map", "gt_mask"]}
METRICS = {f"{level}_{metric.__name__}": (metric, level) for level in FIELDS for metric in (AUROC, AUPR, F1Max)} | {
    "pixel_AUPRO": (AUPRO, "pixel")
}
"""Metrics by the names in the results, with their class and level; all on scores without ties."""
PACKAGES = ("anomalib-dhkd", "anomalib", "torch", "torchvision", "lightning", "timm", "openvino")
MAP_SIZE = 64
"""Rows and columns of the heat maps that are kept for the report."""


def parse(settings: dict[str, Any]) -> tuple[ArgumentParser, Namespace]:
    """Check the model and the data of a job, as anomalib's command line does.

    Args:
        settings (dict[str, Any]): Settings with ``model`` and ``data``.

    Returns:
        tuple[ArgumentParser, Namespace]: The parser and what it made of them, not instantiated.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AnomalibModule, "model", required=True)
    parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    chosen = {
        key: {name: settings[key][name] for name in ("class_path", "init_args") if name in settings[key]}
        for key in ("model", "data")
    }
    return parser, parser.parse_object(chosen)


def create(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model of a job, with untied scores and the benchmark's metrics, and its data.

    Args:
        settings (dict[str, Any]): ``model``, ``data`` and ``image_size``.

    Returns:
        tuple[Any, Any]: An ``AnomalibModule`` and an ``AnomalibDataModule``.
    """
    parser, chosen = parse(settings)
    instances = parser.instantiate_classes(chosen)
    model = instances.model
    if settings["image_size"]:
        model.pre_processor = model.configure_pre_processor((settings["image_size"],) * 2)
    model.post_processor = RankPreservingPostProcessor()
    model.evaluator = Evaluator(
        test_metrics=[
            metric(fields=FIELDS[level], prefix=f"{level}_", strict=False) for metric, level in METRICS.values()
        ]
    )
    model.visualizer = None
    return model, instances.data


def environment() -> dict[str, Any]:
    """Return versions, hardware and the revision of this package's repository."""
    folder = Path(__file__).parent
    described = subprocess.run(  # noqa: S603
        ["git", "-C", folder, "describe", "--always", "--dirty"],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.platform(terse=True),
        "CPU": ov.Core().get_property("CPU", "FULL_DEVICE_NAME"),
        "cores": os.cpu_count(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git revision": described.stdout.strip() or None,  # None outside of a repository
    }


class PredictionRecorder(Callback):
    """Keeps the predictions of a test, without the images."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args, **kwargs) -> None:
        """Keep a batch, which anomalib's post-processor changes afterwards in place."""
        del trainer, pl_module, args, kwargs  # Unused arguments.
        outputs.image = outputs.image[:, :, :1, :1]
        self.batches.append(outputs)


def curves(batches: list[Any]) -> dict[str, np.ndarray]:
    """Compute curves on a grid of 201 false-positive rates: ROC up to 1, PRO up to 0.3.

    Args:
        batches (list[Batch]): Predictions of all test images.

    Returns:
        dict[str, np.ndarray]: ``image_ROC``, ``pixel_ROC`` and ``pixel_PRO``, each of shape ``(2, 201)``.
    """
    found = {}
    for level, (score, truth) in FIELDS.items():
        scores, truths = (torch.cat([getattr(batch, field).flatten() for batch in batches]) for field in (score, truth))
        if truths.unique().numel() == 2:
            found[f"{level}_ROC"] = (1.0, *roc_curve(truths.cpu(), scores.cpu())[:2])
    if "pixel_ROC" in found:
        metric = AUPRO(fields=FIELDS["pixel"])
        for batch in batches:
            metric.update(batch)
        maps = torch.cat([batch.anomaly_map for batch in batches])
        rates, overlaps = metric.compute_pro(metric.perform_cca(), maps)
        found["pixel_PRO"] = (0.3, rates.numpy(), overlaps.numpy())
    grids = {name: np.linspace(0, limit, 201) for name, (limit, *_) in found.items()}
    return {name: np.stack([grids[name], np.interp(grids[name], x, y)]) for name, (_, x, y) in found.items()}


def predictions(batches: list[Any]) -> dict[str, np.ndarray]:
    """Return what the report shows of each test image.

    Args:
        batches (list[Batch]): Predictions of all test images.

    Returns:
        dict[str, np.ndarray]: For ``N`` images ``path``, ``label``, ``score``; ``map`` and ``mask`` of shape
            ``(N, 64, 64)`` with values 0 to 255; ``auroc``, each image's own pixel AUROC, not a number for good ones.
    """

    def small(images: torch.Tensor) -> np.ndarray:
        images = F.interpolate(
            images.reshape(len(images), 1, *images.shape[-2:]).float(), (MAP_SIZE, MAP_SIZE), mode="area"
        )
        return (255 * images[:, 0]).round().to(torch.uint8).cpu().numpy()

    rows: dict[str, list[Any]] = {name: [] for name in ("path", "label", "score", "map", "mask", "auroc")}
    for batch in batches:
        rows["path"].append(np.array(batch.image_path))
        rows["label"].append(batch.gt_label.cpu().numpy())
        rows["score"].append(batch.pred_score.flatten().cpu().numpy())
        rows["map"].append(small(batch.anomaly_map))
        rows["mask"].append(small(batch.gt_mask))
        rows["auroc"].append(
            [
                roc_auc_score(mask.flatten().cpu(), scores.flatten().cpu()) if mask.any() and not mask.all() else np.nan
                for mask, scores in zip(batch.gt_mask, batch.anomaly_map, strict=True)
            ]
        )
    return {name: np.concatenate(values) for name, values in rows.items()}


def train_and_test(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a model, test its last weights, export it to OpenVINO.

    Args:
        settings (dict[str, Any]): ``model``, ``data``, ``seed``, ``image_size``, ``accelerator``, ``trainer``.
        folder (Path): Folder for checkpoint, exported model, curves and predictions.

    Returns:
        dict[str, Any]: Metrics, times, peak memory.
    """
    seed_everything(settings["seed"], workers=True)
    model, datamodule = create(settings)
    recorder = PredictionRecorder()
    engine = Engine(
        callbacks=[recorder],
        default_root_dir=folder,
        accelerator=settings["accelerator"],
        devices=1,
        enable_progress_bar=False,
        **settings["trainer"],
    )
    start = time.perf_counter()
    engine.fit(model, datamodule)
    trained = time.perf_counter()
    (metrics,) = engine.test(model, datamodule)
    tested = time.perf_counter()
    trainer: Any = engine.trainer
    row = {
        **{name: metrics.get(name) for name in METRICS},
        "training [s]": trained - start,
        "test [s]": tested - trained,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "finished": not any(
            (timer.time_remaining() or 1) <= 0 for timer in trainer.callbacks if isinstance(timer, Timer)
        ),
        "train batch size": getattr(datamodule, "train_batch_size", None),
        "training images": len(datamodule.train_data),
        "test images": len(datamodule.test_data),
        "peak memory [GiB]": peak_memory(),
        "peak GPU memory [GiB]": torch.cuda.max_memory_allocated() / 1024**3 if torch.cuda.is_available() else None,
        "checkpoint": engine.best_model_path,
    }
    for name, arrays in (("curves", curves(recorder.batches)), ("predictions", predictions(recorder.batches))):
        np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **arrays)
    make_exportable(model)
    try:
        size = (settings["image_size"],) * 2 if settings["image_size"] else None
        engine.export(model, ExportType.OPENVINO, export_root=folder, model_file_name="f32", input_size=size)
    except Exception as error:  # a model that can't be exported has been measured all the same
        logger.exception("The model can't be exported.")
        row["export error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return row


def measure_inference(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Measure latency, throughput and size of trained models side by side.

    Args:
        settings (dict[str, Any]): ``models``, folders of finished trainings by name; ``image_size`` and ``rounds``.
        folder (Path): Unused.

    Returns:
        dict[str, Any]: ``rows``, one for each model and way of running it.
    """
    del folder  # Unused argument.
    networks, files = {}, {}
    for name, trained in settings["models"].items():
        result = json.loads((Path(trained) / "result.json").read_text())
        networks[name], _ = create(yaml.safe_load((Path(trained) / "job.yaml").read_text()))
        with anomalib_safe_globals(networks[name].checkpoint_safe_globals()):  # hyper-parameters may be enumerations
            checkpoint = torch.load(result["checkpoint"], map_location="cpu", weights_only=True)
        networks[name].load_state_dict(checkpoint["state_dict"])
        files[name] = Path(trained) / "weights" / "openvino"
    table = compare_inference(networks, files, settings["image_size"] or 256, settings["rounds"], ["OpenVINO f32"])
    return {"rows": table.to_dict("records")}


def _end_with_parent() -> None:
    # The parent holds the other end of the standard input; when it dies, however it dies, this read ends.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def main(folder: Path) -> None:
    """Do the job in a folder.

    Args:
        folder (Path): Folder with ``job.yaml``.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings = yaml.safe_load((folder / "job.yaml").read_text())
    do = train_and_test if "model" in settings else measure_inference
    try:
        result = do(settings, folder) | {"environment": environment()}
    except Exception as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        raise
    unfinished = folder / "result.json.part"
    unfinished.write_text(json.dumps(result, indent=2))
    unfinished.replace(folder / "result.json")  # there whole, or not at all


if __name__ == "__main__":
    main(Path(sys.argv[1]))
