# SPDX-License-Identifier: Apache-2.0

"""What trained models cost and detect once they are in use, in PyTorch and in OpenVINO, measured side by side.

Models take turns in one process, so that what else runs on the machine hits all of them alike.
"""

import copy
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import openvino as ov
import pandas as pd
import torch
from anomalib import LearningType
from anomalib.models.components import AnomalibModule
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from torch import nn
from torch.utils.benchmark import Measurement, Timer
from torchmetrics.functional.classification import binary_auroc

from anomalib_dhkd.components.features import FeaturePyramid

PRECISIONS = {"f32": ("f32", "f32"), "bf16": ("FP16", "bf16"), "INT8": ("INT8", "f32")}
"""Exported file and OpenVINO's arithmetic for each precision."""
BATCH_SIZE = 16
"""Images in a batch, or at once in OpenVINO's queue, for the throughput."""


@dataclass
class InferenceSettings:
    """Section ``inference`` of the configuration.

    Attributes:
        image_size (int): Height and width of the images in pixels.
        rounds (int): Number of times that each model's turn comes.
        precisions (list[str]): Precisions in OpenVINO: ``"f32"``, ``"bf16"``, ``"INT8"``.
        backbone (dict[str, Any] | None): ``backbone`` and ``layers`` of a bare backbone that comes first, or none.
        operations (bool): Measure OpenVINO's time by type of operation.
        accuracy (bool): Measure what the exported files detect on the test images.
    """

    image_size: PositiveInt = 256
    rounds: PositiveInt = 50
    precisions: Sequence[Literal["f32", "bf16", "INT8"]] = ("f32",)
    backbone: dict[str, Any] | None = None
    operations: bool = False
    accuracy: bool = False

    @classmethod
    def parse(cls, section: dict[str, Any]) -> "InferenceSettings":
        """Check the section and fill in the defaults."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(cls, "inference")
        return parser.instantiate_classes(parser.parse_object({"inference": section})).inference


class Backbone(AnomalibModule):
    """The bare backbone up to the last of some layers, which is exported and timed as models are.

    Args:
        backbone (str): Name of a timm model.
        layers (Sequence[str]): Layers, finest first.
    """

    def __init__(self, backbone: str, layers: Sequence[str]) -> None:
        super().__init__(pre_processor=False, post_processor=False, evaluator=False, visualizer=False)
        self.model: FeaturePyramid = FeaturePyramid(backbone, layers)
        self.output = namedtuple("Features", [layer.replace(".", "_") for layer in layers])  # type: ignore[misc]  # noqa: PYI024

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Return nothing: there is no training."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """Return that of the models it is compared with."""
        return LearningType.ONE_CLASS

    def forward(self, batch: torch.Tensor, *args, **kwargs) -> Any:
        """Return maps of shape ``(B, C, h, w)``, one a layer, of images of shape ``(B, 3, H, W)`` in ``[0, 1]``."""
        return self.output(*self.model.extract(batch))


def can_be_loaded(path: Path, image_size: int) -> bool:
    """Return whether OpenVINO loads a file for one image, in a process of its own: PaDiM's in INT8 crashes it."""
    load = (
        "import sys, openvino; model = openvino.Core().read_model(sys.argv[1]); size = int(sys.argv[2]);"
        "model.reshape([1, 3, size, size]); openvino.Core().compile_model(model, 'CPU')"
    )
    command = [sys.executable, "-c", load, str(path), str(image_size)]
    return subprocess.run(command, check=False).returncode == 0  # noqa: S603


@cache
def openvino_core() -> ov.Core:
    """Return the process's only Core: two that end as they began leave the thread a freed stack for its signals."""
    return ov.Core()


def compile_file(path: Path, precision: str, image_size: int, options: dict[str, Any]) -> ov.CompiledModel:
    """Have OpenVINO compile a file for one image, because anomalib leaves their number open, which costs time."""
    model = openvino_core().read_model(path)
    model.reshape([1, 3, image_size, image_size])
    return openvino_core().compile_model(
        model, "CPU", {"INFERENCE_PRECISION_HINT": PRECISIONS[precision][1], **options}
    )


def medians(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Time calls in turn, three of each at a time, because in use caches are warm.

    Args:
        calls (Sequence[Callable[[], Any]]): What to call.
        rounds (int): Number of turns of each.

    Returns:
        list[float]: Median time of each call in seconds.
    """
    threads = torch.get_num_threads()
    timers = [
        Timer("call()", globals={"call": call}, label=str(index), num_threads=threads)
        for index, call in enumerate(calls)
    ]
    turns = [timer.timeit(3) for _ in range(rounds) for timer in timers]
    return [measurement.median for measurement in Measurement.merge(turns)]


@dataclass
class Runnable:
    """A model in one way of running it.

    Attributes:
        model (str): Name of the model.
        way (str): Library, and device or precision.
        one (Callable[[], Any]): Runs it on one image.
        many (Callable[[], Any]): Runs it on ``BATCH_SIZE`` images.
        size (int): Bytes of the file, in PyTorch of the weights.
        compiled (ov.CompiledModel | None): The exported model.
    """

    model: str
    way: str
    one: Callable[[], Any]
    many: Callable[[], Any]
    size: int
    compiled: ov.CompiledModel | None = None


def in_torch(name: str, network: nn.Module, image: torch.Tensor) -> Iterator[Runnable]:
    """Yield a network on each device of PyTorch; the image is of shape ``(1, 3, H, W)``."""
    size = sum(value.nbytes for value in network.state_dict().values())
    for way, device in {"torch CPU": "cpu", "torch CUDA": "cuda"}.items():
        if device == "cpu" or torch.cuda.is_available():
            run = torch.inference_mode()(copy.deepcopy(network).eval().to(device).__call__)
            batch = image.expand(BATCH_SIZE, -1, -1, -1).to(device)
            yield Runnable(name, way, partial(run, batch[:1]), partial(run, batch), size)


def in_openvino(name: str, path: Path, precision: str, image: torch.Tensor) -> Runnable:
    """Return an exported model in OpenVINO; the image is of shape ``(1, 3, H, W)``."""
    array = image.numpy()
    compiled = compile_file(path, precision, image.shape[-1], {"PERFORMANCE_HINT": "LATENCY"})
    queue = ov.AsyncInferQueue(compile_file(path, precision, image.shape[-1], {"PERFORMANCE_HINT": "THROUGHPUT"}))

    def run_queue() -> None:
        for _ in range(BATCH_SIZE):
            queue.start_async(array)
        queue.wait_all()

    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    run = partial(compiled.create_infer_request().infer, [array])
    return Runnable(name, f"OpenVINO {precision}", run, run_queue, size, compiled)


def detected(compiled: ov.CompiledModel, items: Sequence[Any]) -> dict[str, float]:
    """Return what an exported model detects.

    Args:
        compiled (ov.CompiledModel): The model, whose scores have no ties.
        items (Sequence[ImageItem]): Test images of the model's input size, with masks.

    Returns:
        dict[str, float]: AUROC of images and of pixels in per cent.
    """
    outputs = [compiled(item.image[None].numpy()) for item in items]
    found = {}
    for level, score, truth in (("image", "pred_score", "gt_label"), ("pixel", "anomaly_map", "gt_mask")):
        scores = torch.cat([torch.from_numpy(output[score]).flatten() for output in outputs])
        truths = torch.cat([getattr(item, truth).flatten() for item in items])
        found[f"{level} AUROC [%]"] = 100 * binary_auroc(scores, truths.int()).item()
    return found


def operations(files: dict[str, Path], image_size: int, rounds: int) -> list[dict[str, Any]]:
    """Measure where OpenVINO spends the time of one image, by its own count, which makes it somewhat slower.

    Args:
        files (dict[str, Path]): Files of one model by precision.
        image_size (int): Height and width of the image in pixels.
        rounds (int): Number of calls to average over.

    Returns:
        list[dict[str, Any]]: Milliseconds of each type of operation in each precision, longest first, without those
            that take none because OpenVINO has merged them into others.
    """
    image = torch.rand(1, 3, image_size, image_size).numpy()
    options = {"PERF_COUNT": True, "PERFORMANCE_HINT": "LATENCY"}
    requests = {
        precision: compile_file(path, precision, image_size, options).create_infer_request()
        for precision, path in files.items()
    }
    for request in requests.values():
        request.infer([image])  # the first call is slow
    rows = []
    for _ in range(rounds):
        for precision, request in requests.items():
            request.infer([image])
            rows += [
                (f"{precision} [ms]", info.node_type, 1000 * info.real_time.total_seconds() / rounds)
                for info in request.get_profiling_info()
            ]
    times = pd.DataFrame(rows, columns=["precision", "operation", "time"])
    table = times.pivot_table("time", "operation", "precision", aggfunc="sum", fill_value=0, sort=False)
    table = table[(table > 0).any(axis=1)].sort_values(table.columns[0], ascending=False)
    table.loc["all"] = table.sum()
    return table.reset_index().to_dict("records")


def compare(
    networks: dict[str, nn.Module],
    files: dict[str, dict[str, Path]],
    settings: InferenceSettings,
    items: Sequence[Any],
) -> dict[str, list[dict[str, Any]]]:
    """Measure latency, throughput and size of networks, and what else is asked for.

    Args:
        networks (dict[str, nn.Module]): Networks by name; the first is the measure of the others.
        files (dict[str, dict[str, Path]]): Exported files by name and ``f32``, ``FP16`` or ``INT8``;
            one that is missing or that OpenVINO can't load is left out.
        settings (InferenceSettings): What to measure.
        items (Sequence[ImageItem]): Test images of the input size, for the accuracy.

    Returns:
        dict[str, list[dict[str, Any]]]: ``rows``, one for each network and way of running it, ``left_out`` and
            ``operations``.
    """
    image = torch.rand(1, 3, settings.image_size, settings.image_size)
    loadable: dict[str, dict[str, Path]] = {name: {} for name in networks}
    left_out = []
    for name, precision in product(networks, settings.precisions):
        path = files[name][PRECISIONS[precision][0]]
        if can_be_loaded(path, settings.image_size):
            loadable[name][precision] = path
        else:
            left_out.append({"model": name, "runs in": f"OpenVINO {precision}"})
    torch_ways = [way for name, network in networks.items() for way in in_torch(name, network, image)]
    openvino_ways = [
        in_openvino(name, loadable[name][precision], precision, image)
        for precision, name in product(settings.precisions, networks)
        if precision in loadable[name]
    ]
    rows = []
    latencies: dict[tuple[str, str], float] = {}
    # One library after the other, because PyTorch's idle threads keep spinning and would slow down OpenVINO's.
    for ways in (torch_ways, openvino_ways):
        time.sleep(1)
        ones = medians([way.one for way in ways], settings.rounds)
        manies = medians([way.many for way in ways], max(1, settings.rounds // BATCH_SIZE))
        for way, one, many in zip(ways, ones, manies, strict=True):
            latencies[way.model, way.way] = one
            row = {
                "model": way.model,
                "runs in": way.way,
                "latency [ms]": 1000 * one,
                "times first": one / latencies.get((next(iter(networks)), way.way), float("nan")),
                "images/s": BATCH_SIZE / many,
                "size [MB]": way.size / 1e6,
            }
            if settings.accuracy and way.compiled is not None and not isinstance(networks[way.model], Backbone):
                row |= detected(way.compiled, items)
            rows.append(row)
    profiles = [
        {"model": name, **row}
        for name, paths in loadable.items()
        if settings.operations and paths
        for row in operations(paths, settings.image_size, settings.rounds)
    ]
    return {"rows": rows, "left_out": left_out, "operations": profiles}
