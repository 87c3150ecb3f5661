# SPDX-License-Identifier: Apache-2.0

"""What a job of the benchmark does, in a process of its own: ``python -m anomalib_dhkd.benchmark.work <folder>``.

The process reads ``job.yaml`` in the folder and writes ``result.json`` there when all is done. A process of its own
makes peak memory the job's own, and a crash in a library the end of this job only.
"""

import copy
import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max
from anomalib.models import Cflow  # lets jsonargparse find all models by their short names
from anomalib.models.components import AnomalibModule
from anomalib.utils.serialization import anomalib_safe_globals
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from torchvision.transforms.v2 import Resize

from anomalib_dhkd import RankPreservingPostProcessor
from anomalib_dhkd.metrics import FIELDS, curves

from .environment import environment, peak_memory
from .inference import PRECISIONS, Backbone, InferenceSettings, compare
from .jobs import data_name
from .parity import measure_parity, parse_formats
from .predictions import PredictionRecorder, predictions
from .robustness import parse_sets, retest

logger = logging.getLogger(__name__)

METRICS = {f"{level}_{metric.__name__}": (metric, level) for level in FIELDS for metric in (AUROC, AUPR, F1Max)} | {
    "pixel_AUPRO": (AUPRO, "pixel")
}
"""Metrics by the names in the results, with their class and level; all on scores without ties."""
OWN_ARGUMENTS: set[str | int] = {"accelerator", "callbacks", "default_root_dir", "devices", "enable_progress_bar"}
"""The trainer's arguments that aren't the configuration's."""
COMPRESSION = {"f32": None, "FP16": CompressionType.FP16, "INT8": CompressionType.INT8_PTQ}
"""anomalib's compression of the exported files."""


def parse(settings: dict[str, Any]) -> tuple[ArgumentParser, Namespace]:
    """Check the settings of a training, as anomalib's command line does.

    Args:
        settings (dict[str, Any]): See :func:`train_and_test`.

    Returns:
        tuple[ArgumentParser, Namespace]: The parser and what it made of them, not instantiated.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(AnomalibModule, "model", required=True)
    parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--image_size", type=PositiveInt | None)
    parser.add_argument("--train_images", type=PositiveInt | None)
    parser.add_class_arguments(Trainer, "trainer", instantiate=False, skip=OWN_ARGUMENTS)
    settings = copy.deepcopy(settings)  # the parser changes lists of classes in place
    return parser, parser.parse_object(
        {key: settings[key] for key in ("data", "seed", "image_size", "train_images", "trainer")}
        | {"model": {key: value for key, value in settings["model"].items() if key != "name"}}
    )


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


def load(folder: Path) -> tuple[Any, Any]:
    """Return the model of a finished training, and its data."""
    model, datamodule = create(yaml.safe_load((folder / "job.yaml").read_text()))
    with anomalib_safe_globals(model.checkpoint_safe_globals()):  # hyper-parameters may be enumerations
        path = json.loads((folder / "result.json").read_text())["checkpoint"]
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
    return model, datamodule


def repeat_images(datamodule: Any, count: int) -> None:
    """Give a data module a number of training images, repeated where there are fewer."""
    datamodule.prepare_data()
    datamodule.setup(TrainerFn.FITTING)  # fit sets up no second time then
    data = datamodule.train_data
    data.samples = data.samples.iloc[np.arange(count) % len(data)].reset_index(drop=True)


def export(model: Any, folder: Path, file: str, image_size: int, datamodule: Any) -> Path:
    """Export a model to OpenVINO.

    Args:
        model (Any): A trained ``AnomalibModule``.
        folder (Path): Folder for ``weights/openvino``.
        file (str): A key of ``COMPRESSION``, which the file is named after.
        image_size (int): Height and width of the images in pixels.
        datamodule (Any): Images of this size for the ranges of INT8.

    Returns:
        Path: File of the model (.xml), which is missing if the model can't be exported.
    """
    # CFlow's forward moves its decoders to the images' device, which torch.export of PyTorch 2.15 refuses.
    decoders: Any = model.model.decoders if isinstance(model, Cflow) else []
    for decoder in decoders:
        decoder.to = lambda _device, decoder=decoder: decoder
    try:
        Engine(default_root_dir=folder).export(
            model,
            ExportType.OPENVINO,
            export_root=folder,
            model_file_name=file,
            input_size=(image_size, image_size),
            compression_type=COMPRESSION[file],
            datamodule=datamodule,
        )
    except Exception:  # it is measured in PyTorch all the same
        logger.exception("The model can't be exported.")
    for decoder in decoders:
        del decoder.to
    return folder / "weights" / "openvino" / f"{file}.xml"


def train_and_test(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a model and test its last weights.

    Args:
        settings (dict[str, Any]): ``model``, ``data``, ``seed``, ``image_size``, ``train_images``, ``accelerator``,
            ``trainer``.
        folder (Path): Folder for checkpoint, curves and predictions.

    Returns:
        dict[str, Any]: Metrics, times, peak memory.
    """
    seed_everything(settings["seed"], workers=True)
    model, datamodule = create(settings)
    if settings["train_images"]:
        repeat_images(datamodule, settings["train_images"])
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
    trainer: Any = engine.trainer
    row: dict[str, Any] = {
        "training [s]": time.perf_counter() - start,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "finished": not any(
            isinstance(timer, Timer) and (timer.time_remaining() or 0) <= 0 for timer in trainer.callbacks
        ),
        "train batch size": getattr(datamodule, "train_batch_size", None),
        "training images": len(datamodule.train_data),
        "test images": len(datamodule.test_data),
        "peak memory [GiB]": peak_memory(),
        "peak GPU memory [GiB]": torch.cuda.max_memory_allocated() / 1024**3 if torch.cuda.is_available() else None,
        "checkpoint": engine.best_model_path,
    }
    start = time.perf_counter()
    (metrics,) = engine.test(model, datamodule)
    row |= {"test [s]": time.perf_counter() - start} | {name: metrics.get(name) for name in METRICS}
    row |= {name: value for name, value in metrics.items() if name.endswith("_shift")}
    for name, arrays in (("curves", curves(recorder.batches)), ("predictions", predictions(recorder.batches))):
        np.savez_compressed(folder / f"{name}.npz", allow_pickle=False, **arrays)
    return row


def measure_inference(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Export trained models to OpenVINO and measure them side by side.

    Args:
        settings (dict[str, Any]): ``models``, folders of finished trainings by name, and ``inference``.
        folder (Path): Folder for the exported models.

    Returns:
        dict[str, Any]: See :func:`anomalib_dhkd.benchmark.inference.compare`.
    """
    chosen = InferenceSettings.parse(settings["inference"])
    size = chosen.image_size
    loaded = {name: load(Path(trained)) for name, trained in settings["models"].items()}
    # Only a trainer tells a data module what size the model needs.
    resize = Resize((size, size), antialias=True)
    for _, datamodule in loaded.values():
        datamodule.train_augmentations = datamodule.val_augmentations = datamodule.test_augmentations = resize
        datamodule.prepare_data()
        datamodule.setup()
    datamodule = next(iter(loaded.values()))[1]
    items = list(datamodule.test_data) if chosen.accuracy else []
    if chosen.backbone:
        loaded = {"bare backbone": (Backbone(**chosen.backbone), datamodule), **loaded}
    needed = {PRECISIONS[precision][0] for precision in chosen.precisions}
    files = {
        name: {file: export(model, folder / str(index), file, size, datamodule) for file in needed}
        for index, (name, (model, datamodule)) in enumerate(loaded.items())
    }
    return compare({name: model for name, (model, _) in loaded.items()}, files, chosen, items)


def measure_again(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Test a trained model again, on changed images or as exported files.

    Args:
        settings (dict[str, Any]): ``trained``, folder of a finished training, and ``robustness`` or ``parity``.
        folder (Path): Folder for the strip of pictures, or for the files.

    Returns:
        dict[str, Any]: ``model``, ``data`` and ``seed`` of the training, and ``rows``, one for each change or format.
    """
    trained = yaml.safe_load((Path(settings["trained"]) / "job.yaml").read_text())
    seed_everything(trained["seed"], workers=True)  # a data module may split its images at random
    model, datamodule = load(Path(settings["trained"]))
    if "parity" in settings:
        rows = measure_parity(model, datamodule, parse_formats(settings["parity"]), folder)
    else:
        rows = retest(model, datamodule, parse_sets(settings["robustness"]), folder, trained["accelerator"])
    return {"model": trained["name"], "data": data_name(trained), "seed": trained["seed"], "rows": rows}


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
    kinds = {"models": measure_inference, "trained": measure_again, "model": train_and_test}
    do = next(do for key, do in kinds.items() if key in settings)
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
