# SPDX-License-Identifier: Apache-2.0

"""What is noticed about the images of a training, from samples of them, so that many cost no more than few."""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anomalib.data.utils import LabelName
from PIL import Image

HEADERS = 200
"""Files of a split at most whose headers are read."""
PIXELS = 15_000_000
"""Pixels of a split, about, that are decoded to look at the light."""
BYTES = 200_000_000
"""Bytes, about, that are read in search of copies."""
BRIGHTER = 1.25
"""Ratio of the light of two splits that is noticed: the training's own views are up to a fifth darker or brighter."""
SPLITS = ("train", "val", "test")


class DataCheck(NamedTuple):
    """What was found.

    Attributes:
        counts (pd.DataFrame): One row a split: images, those that are good, defective and have a mask, sizes, formats.
        size (tuple[int, int] | None): Width and height of most training images.
        warnings (list[str]): What may spoil the result, a sentence or two each.
    """

    counts: pd.DataFrame
    size: tuple[int, int] | None
    warnings: list[str]


def check_data(datamodule: Any) -> DataCheck:
    """Look at the images of a data module.

    Args:
        datamodule (AnomalibDataModule | None): Data module that is set up.

    Returns:
        DataCheck: What was found; of no images where they aren't files.
    """
    rows, headers, warnings = [], {}, []
    splits = {split: samples for split in SPLITS if len(samples := samples_of(datamodule, split))}
    for split, samples in splits.items():
        headers[split] = [_header(file) for file in _some(samples.image_path, HEADERS)]
        good = _good(samples)
        rows.append(
            {
                "": split,
                "images": len(samples),
                "good": int(good.sum()),
                "defective": int((~good).sum()),
                "masks": sum(bool(mask) for mask in samples.get("mask_path", ())),
                "width x height": _listed(f"{width} x {height}" for width, height, *_ in headers[split]),
                "format": _listed(kind for *_, kind in headers[split]),
            }
        )
    every = [header for found in headers.values() for header in found]
    for what, values in (("sizes", [found[:2] for found in every]), ("formats or colours", [f[2] for f in every])):
        if len(set(values)) > 1:
            warnings.append(
                f"The images have different {what}. What differs between good images is not learnt as a defect."
            )
    files = {split: {str(Path(file).absolute()) for file in samples.image_path} for split, samples in splits.items()}
    warnings += copies(files.get("train", set()), files.get("test", set()))
    if "train" in splits and "test" in splits:
        warnings += light(splits["train"].image_path, splits["test"].image_path[_good(splits["test"])])
    sizes = Counter(found[:2] for found in headers.get("train", []))
    return DataCheck(pd.DataFrame(rows), sizes.most_common(1)[0][0] if sizes else None, warnings)


def samples_of(datamodule: Any, split: str) -> pd.DataFrame:
    """Return anomalib's table of the files of ``"train"``, ``"val"`` or ``"test"``; empty if there is none."""
    samples = getattr(getattr(datamodule, f"{split}_data", None), "samples", None)
    return samples if samples is not None else pd.DataFrame()


def copies(train: set[str], test: set[str]) -> list[str]:
    """Look for files with the same content.

    Args:
        train (set[str]): Training images.
        test (set[str]): Test images.

    Returns:
        list[str]: A warning if there are some.
    """
    sizes = defaultdict(list)
    for file in sorted(train | test):
        sizes[Path(file).stat().st_size].append(file)
    suspects = [file for files in sizes.values() if len(files) > 1 for file in files]
    contents, left = defaultdict(list), BYTES
    for file in _some(suspects, len(suspects)):
        if left < 0:
            break
        content = Path(file).read_bytes()
        contents[hashlib.sha256(content).digest()].append(file)
        left -= len(content)
    same = [sorted(files) for files in contents.values() if len(files) > 1]
    if not same:
        return []
    both = sum(bool(train.intersection(files) and test.intersection(files)) for files in same)
    first, second = same[0][:2]
    leak = f" {both} of them are trained on and tested on, which flatters the test." if both else ""
    return [f"{len(same)} images are there more than once, such as {first} and {second}.{leak}"]


def light(train: Sequence[str], test: Sequence[str]) -> list[str]:
    """Compare the light of good images.

    Args:
        train (Sequence[str]): Training images.
        test (Sequence[str]): Good test images.

    Returns:
        list[str]: A warning if a colour is on the average more than :data:`BRIGHTER` times as bright in one as in the
            other.
    """
    if not len(train) or not len(test):
        return []
    ratio = np.maximum(_colour(test), 1) / np.maximum(_colour(train), 1)
    if ratio.min() >= 1 / BRIGHTER and ratio.max() <= BRIGHTER:
        return []
    shares = [f"{name} {100 * value:.0f} %" for name, value in zip(("red", "green", "blue"), ratio, strict=True)]
    warning = f"Good test images have another light than training images: {', '.join(shares)} of theirs on the average."
    return [f"{warning} Train on images in the light of use."]


def _good(samples: pd.DataFrame) -> pd.Series:
    return samples.label_index == LabelName.NORMAL


def _some(files: Iterable[str], count: int) -> list[str]:
    """Return some of the files, always the same ones, in no order."""
    files = list(files)
    return random.Random(0).sample(files, min(count, len(files)))  # noqa: S311


def _header(file: str) -> tuple[int, int, str]:
    with Image.open(file) as image:
        return (*image.size, f"{image.format} {image.mode}")


def _listed(values: Iterable[str]) -> str:
    """Return the values, most frequent first, the rest of many as dots."""
    found = [value for value, _ in Counter(values).most_common()]
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")


def _colour(files: Sequence[str]) -> np.ndarray:
    """Return the mean red, green and blue of some images."""
    means, left = [], PIXELS
    for file in _some(files, HEADERS):
        if left < 0:
            break
        with Image.open(file) as image:
            left -= image.width * image.height
            image.draft("RGB", (256, 256))  # JPEG is decoded faster in small
            means.append(np.asarray(image.convert("RGB").reduce(max(1, min(image.size) // 64))).mean(axis=(0, 1)))
    return np.mean(means, axis=0)
