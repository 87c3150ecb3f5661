# SPDX-License-Identifier: Apache-2.0

"""The subcommand ``watch``: an exported model on the images of a folder, a camera or a video, a JSON line for each."""

import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
from anomalib.data.utils.image import is_image_file
from anomalib.visualization.image import visualize_anomaly_map

from .export import SECTION
from .images import Item, captured, in_folder

logger = logging.getLogger(__name__)

OUTPUTS = {"pred_score", "pred_label", "anomaly_map"}
"""What a model must give; anomalib's exports do."""
LINE_START = b'{"time": "'
"""How each line of the output begins."""


class Detector:
    """An exported model whose requests overlap when threads share it.

    ``openvino.AsyncInferQueue`` would call back from OpenVINO's own threads, where an image's error has no way to its
    line. Here each thread waits for its own request.

    Args:
        path (Path): OpenVINO's file of the model (.xml).
        device (str): OpenVINO's name of the device.
        precision (str): Precision of the arithmetic: ``"f32"``, ``"f16"`` or ``"bf16"``.

    Raises:
        ValueError: If the model isn't anomalib's, or if file or device compute in another precision.
    """

    def __init__(self, path: Path, device: str, precision: str) -> None:
        import openvino as ov  # noqa: PLC0415  # takes seconds

        if path.suffix != ".xml" or not path.is_file() or not path.with_suffix(".bin").is_file():
            msg = f"model must be an OpenVINO file (.xml) with its .bin beside it, got {path}."
            raise ValueError(msg)
        core = ov.Core()
        model = core.read_model(path)
        names = {name for output in model.outputs for name in output.names}
        if not names >= OUTPUTS:
            msg = f"model must give {', '.join(sorted(OUTPUTS))} as anomalib's exports do, got {sorted(names)}."
            raise ValueError(msg)
        key = [SECTION, "precision"]
        if precision != "f32" and model.has_rt_info(key) and model.get_rt_info(key).astype(str) == "f32":
            msg = f"precision must be f32 for {path}, got {precision}. Export it with compression_type FP16 for others."
            raise ValueError(msg)
        shape = model.input().partial_shape
        shape[0] = 1  # anomalib leaves the number of images open, which costs time
        model.reshape(shape)
        # The label is a comparison with the threshold, which may be converted from half precision.
        comparison = model.output("pred_label").get_node().input_value(0).get_node()
        if comparison.get_type_name() != "Greater":
            msg = f"model must compare the score with a threshold, got {comparison.get_type_name()} in {path}."
            raise ValueError(msg)
        constant = ov.Model([comparison.input_value(1)], [])
        self.threshold = round(float(core.compile_model(constant, "CPU")([])[0].item()), 6)
        compiled = core.compile_model(
            model, device, {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": precision}
        )
        got = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if got != precision:
            msg = f"precision {precision} can't be had on {device}, which would compute in {got}."
            raise ValueError(msg)
        self.size = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._shape = shape
        self._requests: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self.size):
            self._requests.put(compiled.create_infer_request())
        self.hash = hashlib.sha256(path.read_bytes() + path.with_suffix(".bin").read_bytes()).hexdigest()[:12]

    def __call__(self, image: np.ndarray) -> tuple[float, bool, np.ndarray]:
        """Return score, whether it is above the threshold, and map of shape ``(h, w)`` of an image.

        Raises:
            ValueError: If the model doesn't take the image's size, or if the score isn't a number.
        """
        if any(fixed.is_static and fixed != given for fixed, given in zip(self._shape, image.shape, strict=True)):
            msg = f"The image is {image.shape[2]} pixels high and {image.shape[3]} wide, the model takes {self._shape}."
            raise ValueError(msg)
        request = self._requests.get()
        try:
            request.start_async({0: image}, share_inputs=True)
            request.wait()
            score, label, heat_map = (
                request.get_tensor(name).data.copy() for name in ("pred_score", "pred_label", "anomaly_map")
            )
        finally:
            self._requests.put(request)
        if not np.isfinite(score).all():
            msg = f"The score is {score.item()}."
            raise ValueError(msg)
        return float(score.item()), bool(label.item()), heat_map.reshape(heat_map.shape[-2:])


class Lines:
    """The output: a file with one JSON object a line, which is added to.

    Attributes:
        done (set): Keys of the items that have a line.
        written (int): Lines that were added.

    Args:
        path (Path): The file.

    Raises:
        ValueError: If the file is there and holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.done: set[tuple[str | int, ...]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        complete, rest = 0, b""
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    rest = line
                    break
                try:
                    record = json.loads(line)
                    key = record["file"], *(record[name] for name in ("size", "modified") if name in record)
                except (ValueError, KeyError, TypeError) as error:
                    msg = f"output must be a new file or one that this command wrote, got {path}, see line {number}."
                    raise ValueError(msg) from error
                if len(key) > 1:  # no camera's frame, which doesn't come again
                    self.done.add(key)
                complete += len(line)
        if not (rest.startswith(LINE_START) or LINE_START.startswith(rest)):
            msg = f"output must be a new file or one that this command wrote, got {path}."
            raise ValueError(msg)
        if rest:
            logger.warning("The last line of %s was half-written; its image is done again.", path)
            os.truncate(path, complete)
        self.written = 0
        self._file = path.open("a", buffering=1)  # each line is flushed
        self._lock = threading.Lock()

    def write(self, record: dict[str, Any]) -> None:
        """Add a line."""
        with self._lock:
            self._file.write(json.dumps(record) + "\n")
            self.written += 1


def heat_map_path(folder: Path, file: str) -> Path:
    """Return where the heat map of a file goes: the file's path, with ``.png`` added unless it ends so.

    Two files that differ in their suffix only don't share a path.

    Example:
        >>> [str(heat_map_path(Path("maps"), file)) for file in ("a/0.png", "a/0.jpg", "a/0.jpg.png")]
        ['maps/a/0.png', 'maps/a/0.jpg.png', 'maps/a/0.jpg.png.png']
    """
    path = folder / file
    return path if path.suffix == ".png" and not is_image_file(path.stem) else path.with_name(path.name + ".png")


def detect(item: Item, detector: Detector, lines: Lines, heat_maps: Path | None) -> None:
    """Do one image: its heat map, if asked for, then its line, which therefore says that both are there."""
    record: dict[str, Any] = {"file": item.file, **item.state}
    try:
        image, notes = item.read()
        score, anomalous, heat_map = detector(image)
    except Exception as error:  # noqa: BLE001  # Pillow raises many kinds on broken files
        record["error"] = f"{type(error).__name__}: {error}"
    else:
        record |= {"score": round(score, 6), "verdict": "anomalous" if anomalous else "normal"}
        if notes:
            record["note"] = "; ".join(notes)
        if heat_maps:
            path = heat_map_path(heat_maps, item.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            visualize_anomaly_map(torch.from_numpy(heat_map)).save(path)
            record["heat_map"] = str(path)
    now = datetime.now(timezone.utc).astimezone().isoformat()
    lines.write({"time": now, **record, "threshold": detector.threshold, "model": detector.hash})


def in_threads(work: Callable[[Item], None], items: Iterable[Item], threads: int, stop: threading.Event) -> None:
    """Do the work on each item, on as many at a time as there are threads; the first failure ends it and is raised."""
    slots, failures = threading.Semaphore(threads), []

    def finish(future: Future) -> None:
        slots.release()
        if failure := future.exception():
            failures.append(failure)
            stop.set()

    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            slots.acquire()
            pool.submit(work, item).add_done_callback(finish)
    if failures:
        raise failures[0]


def watch(
    model: Path,
    source: int | Path,
    output: Path,
    heat_maps: Path | None = None,
    device: str = "CPU",
    precision: Literal["f32", "f16", "bf16"] = "f32",
    settle: float = 0.5,
) -> None:
    """Run an exported model on the images of a folder, a camera or a video.

    Ctrl-C or SIGTERM ends it, once what was begun is written.

    Args:
        model (Path): The exported OpenVINO model (.xml).
        source (int | Path): Folder that is watched with all its folders, index of a camera, or file of a video.
        output (Path): File that a JSON line is added to for each image. Images that have a line aren't done again.
        heat_maps (Path | None): Folder for heat maps, below which each has the path of its image. Defaults to none.
        device (str): OpenVINO's name of the device. Defaults to ``"CPU"``.
        precision (str): Precision of the arithmetic: ``"f32"``, ``"f16"`` or ``"bf16"``. Defaults to ``"f32"``.
        settle (float): Seconds without a change after which a file is taken to be written completely. Defaults to 0.5.

    Raises:
        ValueError: If an argument is wrong, or a camera fails.
        FileNotFoundError: If the watched folder goes.
        ModuleNotFoundError: If a folder is to be watched without watchfiles.
    """
    if isinstance(source, Path):
        if not source.exists():
            msg = f"source must be a folder, a video or the index of a camera, got {source}, which doesn't exist."
            raise ValueError(msg)
        source = source.resolve()
        if heat_maps and heat_maps.resolve().is_relative_to(source):
            msg = f"heat_maps must not be below source, where each would be watched, got {heat_maps}."
            raise ValueError(msg)
    if settle < 0:
        msg = f"settle must be at least 0, got {settle}."
        raise ValueError(msg)
    stop = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        lines, detector = Lines(output), Detector(model, device, precision)
        if isinstance(source, Path) and source.is_dir():
            items = in_folder(source, settle, lines.done, stop)
        else:
            items = captured(source, lines.done, stop)
        logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of each change
        logger.info("Watching %s with %d requests of model %s.", source, detector.size, detector.hash)
        threads = 2 * detector.size  # as many read and write as wait for the model
        in_threads(partial(detect, detector=detector, lines=lines, heat_maps=heat_maps), items, threads, stop)
        logger.info("Ended after %d images, whose lines are in %s.", lines.written, output)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
