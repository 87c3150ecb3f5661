# SPDX-License-Identifier: Apache-2.0

"""What exported files of a trained model say of the test images' own files, against what anomalib's Engine says."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.metrics import Evaluator
from jsonargparse import ArgumentParser

from .inference import BATCH_SIZE, medians, openvino_core
from .predictions import PredictionRecorder

Outputs = dict[str, np.ndarray]
Run = Callable[[np.ndarray], Outputs]


class Format(NamedTuple):
    """A way to export and run a model.

    Attributes:
        export_type (ExportType): anomalib's type.
        compression (CompressionType | None): anomalib's compression.
        precision (str): OpenVINO's arithmetic.
    """

    export_type: ExportType
    compression: CompressionType | None = None
    precision: str = "f32"


FORMATS = {
    "torch": Format(ExportType.TORCH),
    "ONNX": Format(ExportType.ONNX),
    "OpenVINO": Format(ExportType.OPENVINO),
    "OpenVINO in f16": Format(ExportType.OPENVINO, precision="f16"),
    "OpenVINO in bf16": Format(ExportType.OPENVINO, precision="bf16"),
    "OpenVINO FP16": Format(ExportType.OPENVINO, CompressionType.FP16),
    "OpenVINO FP16 in f16": Format(ExportType.OPENVINO, CompressionType.FP16, "f16"),
    "OpenVINO FP16 in bf16": Format(ExportType.OPENVINO, CompressionType.FP16, "bf16"),
    "OpenVINO INT8": Format(ExportType.OPENVINO, CompressionType.INT8),
    "OpenVINO INT8_PTQ": Format(ExportType.OPENVINO, CompressionType.INT8_PTQ),
}
"""Formats by name."""
METRICS = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "pixel_AUPRO": "AUPRO"}
"""Names of the metrics whose change is reported, and how the report calls them."""
ROUNDS = 20
"""Turns of each format in the comparison of latency."""
NOTE = (
    "Parity: each format reads the test images' own files and resizes them itself; Engine trained the model and "
    "set the threshold. Scores and maps are normalised, with the threshold at 0.5. Latency is that of one and of "
    f"{BATCH_SIZE} images of the model's own size, all formats in turns."
)


def parse_formats(section: dict[str, Any]) -> list[str]:
    """Check the section ``parity`` of the configuration.

    Args:
        section (dict[str, Any]): ``formats``, a list of keys of ``FORMATS``.

    Returns:
        list[str]: Names of the formats.

    Raises:
        ValueError: If a format is unknown.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--parity.formats", type=list[str], required=True)
    chosen = parser.parse_object({"parity": section}).parity.formats
    if not set(chosen) <= set(FORMATS):
        msg = f"parity.formats must be some of {list(FORMATS)}, got {chosen}."
        raise ValueError(msg)
    return chosen


def export(model: Any, datamodule: Any, format_: Format, folder: Path) -> tuple[Run, int]:
    """Export a model for images of any size.

    Args:
        model (Any): A trained ``AnomalibModule``.
        datamodule (Any): Its ``AnomalibDataModule``, for the ranges of INT8.
        format_ (Format): How.
        folder (Path): Folder for the file.

    Returns:
        tuple[Run, int]: What runs it on images of shape ``(B, 3, H, W)`` in ``[0, 1]``, and the file's bytes.
    """
    kind, compression, precision = format_
    path = Path(
        str(
            Engine(default_root_dir=folder, logger=False).export(
                model, kind, export_root=folder, compression_type=compression, datamodule=datamodule
            )
        )
    )
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.stem}.*"))
    if kind == ExportType.TORCH:
        return partial(_run_torch, torch.load(path, weights_only=False)["model"].eval()), size
    if kind == ExportType.ONNX:
        import onnxruntime  # noqa: PLC0415  # an optional extra

        return partial(_run_onnx, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])), size
    compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return partial(_run_openvino, compiled), size


@torch.inference_mode()
def _run_torch(model: Any, images: np.ndarray) -> Outputs:
    outputs = model(torch.from_numpy(images))._asdict()
    return {name: value.numpy() for name, value in outputs.items() if value is not None}


def _run_onnx(session: Any, images: np.ndarray) -> Outputs:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True))


def _run_openvino(compiled: ov.CompiledModel, images: np.ndarray) -> Outputs:
    return {output.any_name: value for output, value in compiled([images]).items()}


def measure_parity(model: Any, datamodule: Any, names: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Compare formats with anomalib's Engine on the test images.

    Args:
        model (Any): A trained ``AnomalibModule``.
        datamodule (Any): Its ``AnomalibDataModule``.
        names (Sequence[str]): Keys of ``FORMATS``.
        folder (Path): Folder for the files.

    Returns:
        list[dict[str, Any]]: For each format the largest and the mean difference of score and map, the changes of the
            metrics in percentage points, the labels that changed, size and latency.
    """
    recorder = PredictionRecorder()
    engine = Engine(callbacks=[recorder], default_root_dir=folder, devices=1, accelerator="cpu", logger=False)
    metrics = [metric for metric in model.evaluator.test_metrics if metric.name in METRICS]
    model.evaluator = Evaluator(test_metrics=metrics)
    (expected,) = engine.test(model, datamodule)
    rows, runs = [], []
    for index, name in enumerate(names):
        run, size_of_file = export(model, datamodule, FORMATS[name], folder / str(index))
        scores, maps, labels = [], [], 0
        for batch in recorder.batches:
            images: list[Any] = [read_image(path, as_tensor=True) for path in batch.image_path]
            outputs = [run(image[None].numpy()) for image in images]
            found = {
                key: torch.from_numpy(np.concatenate([output[key] for output in outputs]))
                for key in ("pred_score", "pred_label", "anomaly_map")
            }
            found = {key: value.reshape(getattr(batch, key).shape) for key, value in found.items()}
            scores.append((found["pred_score"] - batch.pred_score).abs().flatten())
            maps.append((found["anomaly_map"] - batch.anomaly_map).abs().flatten(1))
            labels += int((found["pred_label"].bool() != batch.pred_label.bool()).sum())
            for metric in metrics:
                metric.update(batch.update(in_place=False, **found))
        score, anomaly_map = torch.cat(scores), torch.cat(maps)
        row = {
            "format": name,
            "score, largest": score.max().item(),
            "score, mean": score.mean().item(),
            "map, largest": anomaly_map.max().item(),
            "map, mean": anomaly_map.mean().item(),
            "labels": labels,
        }
        for metric in metrics:
            row[f"{METRICS[metric.name]} [points]"] = 100 * (metric.compute().item() - expected[metric.name])
            metric.reset()
        rows.append(row | {"size [MB]": size_of_file / 1e6})
        runs.append(run)
    height, width = model.input_size
    image = np.random.default_rng(0).random((BATCH_SIZE, 3, height, width), dtype=np.float32)
    for key, count in (("latency [ms]", 1), (f"latency of {BATCH_SIZE} [ms]", BATCH_SIZE)):
        for row, seconds in zip(rows, medians([partial(run, image[:count]) for run in runs], ROUNDS), strict=True):
            row[key] = 1000 * seconds
    return rows
