# SPDX-License-Identifier: Apache-2.0

"""Images of folders, cameras and videos as an exported model takes them."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
from anomalib.data.utils.image import is_image_file
from PIL import ExifTags, Image

logger = logging.getLogger(__name__)

RANGE_OF_I = {"PPM", "PNG"}
"""Formats whose 16-bit images Pillow may open with 32 bits, in the range of 16."""


def as_input(array: np.ndarray, order: Literal["RGB", "BGR"] = "RGB") -> tuple[np.ndarray, list[str]]:
    """Turn an array, such as a camera's frame, into what an exported model takes.

    Grey becomes three equal channels. An alpha channel is dropped. Values are divided by the range of their type.

    Args:
        array (np.ndarray): Image of shape ``(H, W)`` or ``(H, W, C)`` with 1, 3 or 4 channels and of type ``uint8`` or
            ``uint16``.
        order (str): Order of the colours: ``"RGB"`` or ``"BGR"``, which is OpenCV's. Defaults to ``"RGB"``.

    Returns:
        tuple[np.ndarray, list[str]]: Image of shape ``(1, 3, H, W)`` in ``[0, 1]`` and type ``float32``, and what was
        done to it beyond division by 255.

    Raises:
        ValueError: If shape, type or order is another.

    Example:
        >>> image, notes = as_input(np.full((480, 640), 65535, dtype=np.uint16))
        >>> image.shape, float(image.max()), notes
        ((1, 3, 480, 640), 1.0, ['grey repeated in three channels', '16 bits divided by 65535'])
    """
    if order not in {"RGB", "BGR"}:
        msg = f"order must be 'RGB' or 'BGR', got {order!r}."
        raise ValueError(msg)
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        msg = f"array must be of type uint8 or uint16, because the range of others isn't known, got {array.dtype}."
        raise ValueError(msg)
    shape, notes = array.shape, []
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[-1] not in {1, 3, 4} or not array.size:
        msg = f"array must be of shape (H, W) or (H, W, C) with 1, 3 or 4 channels, got {shape}."
        raise ValueError(msg)
    if array.shape[-1] == 1:
        notes.append("grey repeated in three channels")
        array = array.repeat(3, axis=-1)
    elif array.shape[-1] == 4:
        notes.append("alpha dropped")
        array = array[..., :3]
    if array.dtype.itemsize == 2:
        notes.append("16 bits divided by 65535")
    if order == "BGR":
        array = array[..., ::-1]
    image = np.empty((1, 3, *array.shape[:2]), dtype=np.float32)
    np.divide(array.transpose(2, 0, 1), np.iinfo(array.dtype).max, out=image[0], dtype=np.float32, casting="same_kind")
    return image, notes


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """Read a file as anomalib's ``read_image`` does, but for 16-bit grey, which that cuts at 255.

    Args:
        path (Path): The file.

    Returns:
        tuple[np.ndarray, list[str]]: Image of shape ``(1, 3, H, W)`` in ``[0, 1]`` and type ``float32``, and what was
        done to it or what it holds beyond 8-bit RGB.

    Raises:
        Exception: What Pillow raises on a broken file, which are many kinds.
        ValueError: If the range of the values isn't known.
    """
    with Image.open(path) as image:
        mode, notes = image.mode, []
        # Pillow says how the file holds the values nowhere else, and nowhere any more once they are loaded.
        deep = ";16" in str(image.tile)
        if (frames := getattr(image, "n_frames", 1)) > 1:
            notes.append(f"first of {frames} images in the file")
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation != 1:
            notes.append(f"EXIF orientation {orientation} not applied, as in training")
        if mode.startswith("I;16") or (mode == "I" and image.format in RANGE_OF_I):
            array, more = as_input(np.asarray(image).astype(np.uint16))
            return array, notes + more
        if mode in {"I", "F"}:
            kind = "floating-point numbers" if mode == "F" else "signed or 32-bit integers"
            msg = f"The image holds {kind}, whose range isn't known; 8 and 16 bits are allowed."
            raise ValueError(msg)
        if deep:
            notes.append("upper 8 of 16 bits a channel, as in training")
        if mode != "RGB":
            notes.append(f"{mode} converted to RGB")
        if image.has_transparency_data:
            notes.append("alpha dropped")
        array, _ = as_input(np.asarray(image.convert("RGB")))
        return array, notes


class Item(NamedTuple):
    """An image that is to be done.

    Attributes:
        file (str): File relative to the source, or a frame's name.
        read (Callable[[], tuple[np.ndarray, list[str]]]): Returns the image as the model takes it, and notes.
        state (dict[str, int]): Size in bytes and time of modification of the file, none for a camera.
    """

    file: str
    read: Callable[[], tuple[np.ndarray, list[str]]]
    state: dict[str, int]

    @property
    def key(self) -> tuple[str | int, ...]:
        """By what an image is known as done."""
        return (self.file, *self.state.values())


def file_state(path: Path) -> dict[str, int]:
    """Return size and time of modification of a file in bytes and nanoseconds, nothing if it is no file."""
    try:
        stat = path.stat()
    except OSError:
        return {}
    return {"size": stat.st_size, "modified": stat.st_mtime_ns} if path.is_file() else {}


def in_folder(source: Path, settle: float, done: set[tuple[str | int, ...]], stop: threading.Event) -> Iterator[Item]:
    """Yield a folder's images: what is there, then what comes, once nothing has changed them for ``settle`` seconds."""
    try:
        import watchfiles  # noqa: PLC0415  # an optional extra
    except ModuleNotFoundError as error:
        msg = "source is a folder, which needs watchfiles: pip install 'anomalib-dhkd[watch]'."
        raise ModuleNotFoundError(msg) from error
    turns = watchfiles.watch(  # one every tenth of a second
        source, watch_filter=None, debounce=100, rust_timeout=100, yield_on_timeout=True, stop_event=stop
    )
    changed = [source]
    waiting: dict[Path, tuple[dict[str, int], float]] = {}
    for changes in turns:
        if not source.is_dir():
            msg = f"source is gone: {source}."
            raise FileNotFoundError(msg)
        for path in changed + sorted(Path(path) for _, path in changes):
            # A new folder may hold files that came before it was watched.
            found = sorted(path.rglob("*")) if path.is_dir() else [path]
            waiting.update({image: ({}, 0.0) for image in found if is_image_file(image)})
        changed = []
        for path, (state, since) in list(waiting.items()):
            if stop.is_set():
                return
            item = Item(path.relative_to(source).as_posix(), partial(read, path), file_state(path))
            if not item.state or item.key in done:
                del waiting[path]
            elif item.state != state:
                waiting[path] = (item.state, time.monotonic())
            elif time.monotonic() - since >= settle:
                del waiting[path]
                done.add(item.key)
                yield item


def captured(source: int | Path, done: set[tuple[str | int, ...]], stop: threading.Event) -> Iterator[Item]:
    """Yield the frames of a camera, named by their time, or those of a video, named by their number."""
    if isinstance(source, Path):
        capture, state = cv2.VideoCapture(str(source)), file_state(source)
    else:
        capture, state = cv2.VideoCapture(source), {}
    for number in count():
        if stop.is_set():
            return
        if not capture.grab():
            if isinstance(source, int) or number == 0:
                msg = f"source must be a folder, camera or video that can be read; {source} gives no image {number}."
                raise ValueError(msg)
            logger.info("%s ended after %d of %d frames.", source, number, capture.get(cv2.CAP_PROP_FRAME_COUNT))
            return
        if isinstance(source, Path):
            name = f"{source.name}/{number:06}"
        else:
            name = f"camera_{source}/{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%f}"
        if (name, *state.values()) not in done:
            yield Item(name, partial(as_input, capture.retrieve()[1], "BGR"), state)
