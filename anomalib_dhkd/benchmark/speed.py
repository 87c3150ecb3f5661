# SPDX-License-Identifier: Apache-2.0

"""Compare training time, latency, throughput, memory and model size, and show how they grow.

``python -m anomalib_dhkd.benchmark.speed --config configs/benchmark/speed.yaml --data.init_args.root path/to/mvtec_ad``

Each training has a process of its own, which makes its peak memory its own; inference alternates between the models
in one process, so that what else runs on the machine hits all of them alike.
"""

import copy
import hashlib
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import nncf
import numpy as np
import openvino as ov
import pandas as pd
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from jsonargparse import auto_cli
from lightning.pytorch import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader

from anomalib_dhkd import Dhkd
from anomalib_dhkd.components.features import FeaturePyramid

from .models import EPOCHS, FEATURES, MODELS, create, make_exportable

logger = logging.getLogger(__name__)

PRECISIONS = {"OpenVINO f32": ("f32", "f32"), "OpenVINO bf16": ("f32", "bf16"), "OpenVINO INT8": ("int8", "f32")}
"""Exported file and inference precision of each way of running a model in OpenVINO."""


def train(
    name: str,
    datamodule: AnomalibDataModule,
    results_dir: Path,
    *,
    image_size: int = 256,
    images: int | None = None,
    seed: int = 0,
    max_minutes: float | None = None,
    export: bool = True,
    **arguments: Any,
) -> dict[str, Any]:
    """Train a model and export it.

    Args:
        name (str): Name of a model.
        datamodule (AnomalibDataModule): Data.
        results_dir (Path): Folder for checkpoints and exported models.
        image_size (int): Height and width of the images. Defaults to ``256``.
        images (int | None): Number of training images, repeated where there are fewer. Defaults to all.
        seed (int): Seed of all random numbers. Defaults to ``0``.
        max_minutes (float | None): Time after which training stops unfinished. Defaults to ``None``.
        export (bool): Whether to export to OpenVINO, in f32 and in INT8. Defaults to ``True``.
        **arguments: Further arguments of the model.

    Returns:
        dict[str, Any]: Seconds of ``fit``, epochs, whether it ended by itself, and the process' peak memory in GiB.
    """
    seed_everything(seed, workers=True)
    model = create(name, image_size, **arguments)
    if images is not None:
        datamodule.prepare_data()
        datamodule.setup(TrainerFn.FITTING)  # fit sets up no second time then
        data: Any = datamodule.train_data
        data.samples = data.samples.iloc[np.arange(images) % len(data)].reset_index(drop=True)
    engine = Engine(
        default_root_dir=results_dir,
        max_epochs=EPOCHS[name],
        max_time=None if max_minutes is None else {"minutes": max_minutes},
        enable_progress_bar=False,
    )
    start = time.perf_counter()
    engine.fit(model, datamodule)
    seconds = time.perf_counter() - start
    row = {
        "model": name,
        "image size": image_size,
        "images": len(datamodule.train_data),
        "epochs": engine.trainer.current_epoch,
        "finished": max_minutes is None or seconds < 60 * max_minutes,
        "training [s]": seconds,
        "peak memory [GiB]": peak_memory(),
        "checkpoint": engine.best_model_path,
    }
    if export:
        make_exportable(model)
        for file, compression in (("f32", None), ("int8", CompressionType.INT8_PTQ)):
            engine.export(
                model,
                ExportType.OPENVINO,
                export_root=results_dir / name,
                model_file_name=file,
                input_size=(image_size, image_size),
                compression_type=compression,
                datamodule=datamodule,
            )
    return row


def peak_memory() -> float:
    """Return the largest resident memory of this process so far in GiB (Linux).

    ``getrusage`` would include what the parent process had when it started this one.
    """
    (kibibytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kibibytes) / 1024**2


def train_once(name: str, datamodule: AnomalibDataModule, results_dir: Path, **arguments: Any) -> dict[str, Any]:
    """Call :func:`train` in a process of its own, unless a call with the same model and arguments has ended before.

    Args:
        name (str): Name of a model.
        datamodule (AnomalibDataModule): Data, the same in all calls with one folder.
        results_dir (Path): Folder for what :func:`train` writes and returns.
        **arguments: Further arguments of :func:`train`.

    Returns:
        dict[str, Any]: What :func:`train` returned.
    """
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
    file = results_dir / "trainings" / f"{name}-{digest[:8]}.json"
    if not file.exists():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row = pool.submit(train, name, datamodule, results_dir, **arguments).result()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    return json.loads(file.read_text())


class Backbone(nn.Module):
    """The bare backbone up to the last layer that the models use."""

    def __init__(self) -> None:
        super().__init__()
        self.features = FeaturePyramid(**FEATURES)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the features of images."""
        return self.features.extract(images)


def export_backbone(model: Backbone, images: list[np.ndarray], folder: Path) -> None:
    """Export the bare backbone as anomalib exports models.

    Args:
        model (Backbone): The backbone.
        images (list[np.ndarray]): Images of shape ``(1, 3, H, W)`` to quantise with.
        folder (Path): Folder for the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program: Any = torch.onnx.export(model.eval(), (torch.from_numpy(images[0]),), dynamo=True, verbose=False)
    program.save(folder / "model.onnx")
    exported = ov.convert_model(folder / "model.onnx")
    ov.save_model(exported, folder / "f32.xml", compress_to_fp16=False)
    ov.save_model(nncf.quantize(exported, nncf.Dataset(images)), folder / "int8.xml", compress_to_fp16=False)


def median_latencies(ways: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Time functions in turn, three calls at a time, after one call of each to warm up.

    Args:
        ways (dict[Any, Callable[[], Any]]): Functions by name.
        rounds (int): Number of turns of each.

    Returns:
        dict[Any, float]: Median time of a call in milliseconds.
    """
    times: dict[Any, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _, (name, way), _ in product(range(rounds), ways.items(), range(3)):  # three in a row: caches are warm in use
        start = time.perf_counter()
        way()
        times[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def can_be_loaded(path: Path, shape: Sequence[int]) -> bool:
    """Return whether OpenVINO loads a model for an input shape.

    Tried in a process of its own: some models crash OpenVINO (PaDiM in INT8), others fix the number of images
    (Patchcore).
    """
    load = (
        "import sys, openvino; model = openvino.Core().read_model(sys.argv[1]);"
        "model.reshape([int(size) for size in sys.argv[2:]]); openvino.Core().compile_model(model, 'CPU')"
    )
    return subprocess.run([sys.executable, "-c", load, str(path), *map(str, shape)], check=False).returncode == 0  # noqa: S603


def compare_inference(
    networks: dict[str, nn.Module],
    folders: dict[str, Path],
    image_size: int,
    rounds: int,
    ways: Sequence[str] = tuple(PRECISIONS),
    batch_size: int = 16,
) -> pd.DataFrame:
    """Measure latency and throughput of networks in PyTorch and OpenVINO.

    Args:
        networks (dict[str, nn.Module]): Networks by name; the first, where it can be run, is the measure of the others.
        folders (dict[str, Path]): Folders of their exported files; a file that is missing is left out.
        image_size (int): Height and width of the images.
        rounds (int): Number of timed calls of each.
        ways (Sequence[str]): Keys of ``PRECISIONS``. Defaults to all.
        batch_size (int): Images in a batch, or at once in OpenVINO's queue, for the throughput. Defaults to ``16``.

    Returns:
        pd.DataFrame: One row for each network and way of running it.
    """
    core = ov.Core()
    image = torch.rand(1, 3, image_size, image_size)
    latency: dict[Any, Callable[[], Any]] = {}
    throughput: dict[Any, Callable[[], Any]] = {}
    sizes: dict[Any, float] = {}

    def run(network: nn.Module, images: torch.Tensor) -> None:
        with torch.inference_mode():
            network(images)
        if images.is_cuda:
            torch.cuda.synchronize()

    def run_queue(queue: ov.AsyncInferQueue) -> None:
        for _ in range(batch_size):
            queue.start_async(image.numpy())
        queue.wait_all()

    for name, network in networks.items():
        network.eval()
        devices = {"torch CPU": "cpu"} | ({"torch CUDA": "cuda"} if torch.cuda.is_available() else {})
        for way, device in devices.items():
            on_device = copy.deepcopy(network).to(device)
            batch = image.expand(batch_size, -1, -1, -1).to(device)
            latency[name, way] = partial(run, on_device, batch[:1])
            throughput[name, way] = partial(run, on_device, batch)
            sizes[name, way] = sum(value.nbytes for value in network.state_dict().values())
        for way in ways:
            file, precision = PRECISIONS[way]
            path = folders[name] / f"{file}.xml"
            if not path.exists() or not can_be_loaded(path, image.shape):
                logger.warning("%s is missing, or OpenVINO can't load it for one image; it is left out.", path)
                continue
            exported = core.read_model(path)
            exported.reshape(list(image.shape))  # anomalib leaves the number of images open, which costs time
            options = {"INFERENCE_PRECISION_HINT": precision}
            compiled = core.compile_model(exported, "CPU", options | {"PERFORMANCE_HINT": "LATENCY"})
            latency[name, way] = partial(compiled.create_infer_request().infer, [image.numpy()])
            compiled = core.compile_model(exported, "CPU", options | {"PERFORMANCE_HINT": "THROUGHPUT"})
            queue = ov.AsyncInferQueue(compiled)
            throughput[name, way] = partial(run_queue, queue)
            sizes[name, way] = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    latencies: dict[Any, float] = {}
    throughputs: dict[Any, float] = {}
    for library in ("torch", "OpenVINO"):
        # One after the other, because PyTorch's idle threads keep spinning and would slow down OpenVINO's.
        time.sleep(1)
        latencies |= median_latencies(
            {key: call for key, call in latency.items() if key[1].startswith(library)}, rounds
        )
        throughputs |= median_latencies(
            {key: call for key, call in throughput.items() if key[1].startswith(library)}, max(1, rounds // batch_size)
        )
    table = pd.DataFrame(
        {
            "model": name,
            "runs in": way,
            "latency [ms]": value,
            "times first": value / latencies.get((next(iter(networks)), way), float("nan")),
            "images/s": 1000 * batch_size / throughputs[name, way],
            "size [MB]": sizes[name, way] / 1e6,
        }
        for (name, way), value in latencies.items()
    )
    return table.sort_values("runs in", kind="stable", ascending=False)


def profile(folder: Path, image_size: int, rounds: int) -> pd.DataFrame:
    """Measure where OpenVINO spends the time of one image, in single precision and in INT8.

    Args:
        folder (Path): Folder of the exported files.
        image_size (int): Height and width of the image.
        rounds (int): Number of calls to average over.

    Returns:
        pd.DataFrame: Milliseconds by type of operation and precision, longest first, without those of no time, which
            OpenVINO has merged into others.
    """
    core = ov.Core()
    image = np.random.default_rng(0).random((1, 3, image_size, image_size), dtype=np.float32)
    options = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    requests = {}
    for file in ("f32", "int8"):
        exported = core.read_model(folder / f"{file}.xml")
        exported.reshape(list(image.shape))
        requests[file] = core.compile_model(exported, "CPU", options).create_infer_request()
        requests[file].infer([image])  # the first call is slow
    rows = []
    for _, (file, request) in product(range(rounds), requests.items()):
        request.infer([image])
        rows += [
            (f"{file} [ms]", info.node_type, 1000 * info.real_time.total_seconds() / rounds)
            for info in request.get_profiling_info()
        ]
    times = pd.DataFrame(rows, columns=["file", "operation", "time"])
    table = times.pivot_table("time", "operation", "file", aggfunc="sum", fill_value=0).sort_values(
        "f32 [ms]", ascending=False
    )
    table.loc["all"] = table.sum()
    return table[(table > 0).any(axis=1)].reset_index()


def compare_accuracy(folder: Path, data: AnomalibDataModule, image_size: int) -> pd.DataFrame:
    """Measure what the precisions detect.

    Args:
        folder (Path): Folder of the exported files of a model whose scores have no ties.
        data (AnomalibDataModule): Test images with masks.
        image_size (int): Height and width of the images.

    Returns:
        pd.DataFrame: AUROC of images and of pixels, in per cent, in each precision.
    """
    resize: Any = Dhkd.configure_pre_processor((image_size, image_size))
    images = []
    truths: dict[str, list[np.ndarray]] = {"pred_score": [], "anomaly_map": []}
    # In this process: worker processes leave a signal handler behind, which crashes the next training's end.
    test_data: Any = data.test_data
    for batch in DataLoader(test_data, batch_size=16, collate_fn=test_data.collate_fn):
        image, mask = resize.transform(batch.image, batch.gt_mask)
        images += image.split(1)
        truths["pred_score"].append(batch.gt_label.numpy())
        truths["anomaly_map"].append(mask.numpy().ravel())
    rows = []
    for way, (file, precision) in PRECISIONS.items():
        compiled = ov.Core().compile_model(folder / f"{file}.xml", "CPU", {"INFERENCE_PRECISION_HINT": precision})
        outputs = [compiled(image.numpy()) for image in images]
        values = [
            100 * roc_auc_score(np.concatenate(truth), np.stack([output[name] for output in outputs]).ravel())
            for name, truth in truths.items()
        ]
        rows.append((way, *values))
    return pd.DataFrame(rows, columns=["runs in", "image AUROC", "pixel AUROC"])


def plot_growth(table: pd.DataFrame, file: Path) -> None:
    """Plot training time and memory over the number of images and of pixels, each with its straight line.

    Args:
        table (pd.DataFrame): Rows of :func:`train`, with ``by`` saying what was varied.
        file (Path): Picture to write.
    """
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), sharex="col")
    for column, (by, label) in enumerate({"images": "training images", "pixels": "pixels of an image"}.items()):
        rows = table[table["by"] == by]
        x = rows["images"] if by == "images" else rows["image size"] ** 2
        for axis, value in zip(axes[:, column], ("training [s]", "peak memory [GiB]"), strict=True):
            axis.plot(x, rows[value], "o")
            axis.plot(x, np.polyval(np.polyfit(x, rows[value], 1), x), "-", linewidth=1)
            axis.set_ylim(bottom=0)
            axis.set_ylabel(value)
        axes[1, column].set_xlabel(label)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main(
    data: AnomalibDataModule,
    models: Sequence[str] = tuple(MODELS),
    image_size: int = 256,
    repeats: int = 1,
    max_minutes: float | None = None,
    rounds: int = 50,
    images: Sequence[int] = (100, 200, 400),
    image_sizes: Sequence[int] = (256, 384, 512),
    dhkd: dict[str, Any] | None = None,
    results_dir: Path = Path("results/speed"),
) -> None:
    """Write and print the tables; trainings that an earlier call has finished are kept.

    Args:
        data: Training and test images.
        models: Names of models; of the first, OpenVINO's time by operation and AUROC by precision are shown, too.
        image_size: Height and width of the images.
        repeats: How often each model is trained, with seeds from 0.
        max_minutes: Time after which a training stops unfinished.
        rounds: How often each model's latency is measured.
        images: Numbers of training images to show the growth over; none for no growth.
        image_sizes: Heights and widths to show the growth over.
        dhkd: Arguments of DHKD, where they aren't the defaults.
        results_dir: Folder for tables, picture, checkpoints and exported models of these data.
    """
    results_dir.mkdir(parents=True, exist_ok=True)
    arguments = {name: dhkd or {} if name == "Dhkd" else {} for name in models}
    rows = [
        train_once(
            name,
            data,
            results_dir,
            image_size=image_size,
            seed=seed,
            max_minutes=max_minutes,
            **arguments[name],
        )
        for seed, name in product(range(repeats), models)
    ]
    training = pd.DataFrame(rows)
    training.to_csv(results_dir / "training.csv", index=False)
    summary = training.groupby("model", sort=False)[
        ["training [s]", "peak memory [GiB]", "epochs", "finished"]
    ].median()
    summary["times first"] = summary["training [s]"] / summary["training [s]"].iloc[0]
    print(summary.to_markdown(floatfmt=".3g"))  # noqa: T201

    data.prepare_data()
    data.setup()
    resize: Any = Dhkd.configure_pre_processor((image_size, image_size))
    items: Any = data.train_data
    examples = [resize.transform(item.image[None]).numpy() for item in items]
    backbone = Backbone()
    export_backbone(backbone, examples, results_dir / "Backbone" / "weights" / "openvino")
    networks: dict[str, nn.Module] = {"Backbone": backbone}
    for name in models:
        checkpoint = training.loc[training["model"] == name, "checkpoint"].iloc[-1]
        networks[name] = MODELS[name][0].load_from_checkpoint(checkpoint)
    folders = {name: results_dir / name / "weights" / "openvino" for name in networks}
    inference = compare_inference(networks, folders, image_size, rounds)
    inference = inference.rename(columns={"times first": "times backbone"})
    inference.to_csv(results_dir / "inference.csv", index=False)
    print(inference.to_markdown(index=False, floatfmt=".3g"))  # noqa: T201
    operations = profile(folders[models[0]], image_size, rounds)
    operations.to_csv(results_dir / "profile.csv", index=False)
    print(operations.to_markdown(index=False, floatfmt=".3g"))  # noqa: T201
    accuracy = compare_accuracy(folders[models[0]], data, image_size)
    accuracy.to_csv(results_dir / "accuracy.csv", index=False)
    print(accuracy.to_markdown(index=False, floatfmt=".2f"))  # noqa: T201

    if images:
        jobs = [("images", {"images": count, "image_size": image_size}) for count in images]
        jobs += [("pixels", {"image_size": size}) for size in image_sizes]
        rows = []
        for by, job in jobs:
            row = train_once("Dhkd", data, results_dir, export=False, **job, **(dhkd or {}))
            rows.append({"by": by} | row)
        growth = pd.DataFrame(rows)
        growth.to_csv(results_dir / "growth.csv", index=False)
        plot_growth(growth, results_dir / "growth.png")
        columns = ["by", "images", "image size", "training [s]", "peak memory [GiB]"]
        print(growth[columns].to_markdown(index=False, floatfmt=".3g"))  # noqa: T201


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
