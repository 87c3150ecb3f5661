# SPDX-License-Identifier: Apache-2.0

"""A small anomaly detection data set made on the spot, for a first run without any download.

The good images are crops of texture photographs that scikit-image ships; the defective ones carry a painted scratch,
stain, dent, hole or foreign piece with an exact mask.
"""

import logging
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from anomalib.data import MVTecAD
from anomalib.utils.path import get_datasets_dir
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom
from skimage import data, draw, transform
from skimage.color import rgb2gray

logger = logging.getLogger(__name__)

CATEGORIES = ("brick", "grass", "gravel")
SIZE = 256


class Quickstart(MVTecAD):
    """Data module of painted defects on texture photographs, in MVTec AD's folder layout.

    The images are written once, to ``<root>/seed<seed>_<num_train>_<num_test>/<category>`` (with ``_changed_light``
    after the numbers if it is changed), and are the same for the same arguments on every machine with the same versions
    of numpy, scipy and scikit-image.

    Args:
        root (Path | str | None): Folder for the images. Defaults to ``None``, anomalib's folder for data sets of this
            user.
        category (str): Texture: ``"brick"``, ``"grass"`` or ``"gravel"``.
            Defaults to ``"brick"``.
        num_train (int): Good images for training, at least 1.
            Defaults to ``96``.
        num_test (int): Test images of each kind (good, dent, foreign, hole, scratch, stain), at least 1.
            Defaults to ``12``.
        seed (int): Seed of the images.
            Defaults to ``0``.
        changed_light (bool): Whether the test images are as dimmer lamps that fall off to one side would show them.
            Defaults to ``False``.
        train_batch_size (int): Defaults to ``16``.
        eval_batch_size (int): Defaults to ``16``.
        num_workers (int): Defaults to ``2``.
        **kwargs: Further arguments of ``anomalib.data.MVTecAD``.

    Raises:
        ValueError: If ``category`` is unknown, or ``num_train`` or ``num_test`` is below 1.

    Example:
        >>> datamodule = Quickstart(category="gravel")
        >>> datamodule.prepare_data()  # doctest: +SKIP
    """

    def __init__(
        self,
        root: Path | str | None = None,
        category: str = "brick",
        num_train: int = 96,
        num_test: int = 12,
        seed: int = 0,
        changed_light: bool = False,
        train_batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 2,
        **kwargs: Any,
    ) -> None:
        if category not in CATEGORIES:
            msg = f"category must be one of {CATEGORIES}, got {category!r}."
            raise ValueError(msg)
        for name, value in (("num_train", num_train), ("num_test", num_test)):
            if value < 1:
                msg = f"{name} must be at least 1, got {value}."
                raise ValueError(msg)
        folder = Path(root) if root is not None else get_datasets_dir() / "Quickstart"
        super().__init__(
            root=folder / f"seed{seed}_{num_train}_{num_test}{'_changed_light' if changed_light else ''}",
            category=category,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            **kwargs,
        )
        self.num_train = num_train
        self.num_test = num_test
        self.image_seed = seed
        self.changed_light = changed_light

    def prepare_data(self) -> None:
        """Write the images unless they are there."""
        target = self.root / self.category
        if target.is_dir():
            logger.info("Found the dataset.")
            return
        self.root.mkdir(parents=True, exist_ok=True)
        # An interrupted run must not leave half a data set behind: write aside, then move.
        scratch = Path(mkdtemp(dir=self.root, prefix=f".{self.category}-"))
        logger.info("Writing the quickstart images to %s", target)
        write_category(scratch, self.category, self.num_train, self.num_test, self.image_seed, self.changed_light)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(scratch)  # another process was faster


def write_category(
    folder: Path, category: str, num_train: int, num_test: int, seed: int, changed_light: bool = False
) -> None:
    """Write the images and masks of one category in MVTec AD's layout.

    Args:
        folder (Path): Folder of the category.
        category (str): Name of the texture.
        num_train (int): Good images for training.
        num_test (int): Test images of each kind.
        seed (int): Seed of the images.
        changed_light (bool): Whether the light of the test images is changed. Defaults to ``False``.
    """
    texture = getattr(data, category)() / 255.0
    kinds = [("train", "good", num_train), ("test", "good", num_test), *(("test", kind, num_test) for kind in DEFECTS)]
    for number, (split, kind, count) in enumerate(kinds):
        images, masks = folder / split / kind, folder / "ground_truth" / kind
        images.mkdir(parents=True)
        if kind != "good":
            masks.mkdir(parents=True)
        for index in range(count):
            rng = np.random.default_rng([seed, CATEGORIES.index(category), number, index])
            image = good_image(rng, texture)
            if kind != "good":
                image, mask = DEFECTS[kind](rng, image)
                _save(mask, masks / f"{index:03d}_mask.png")
            if changed_light and split == "test":
                image = change_light(rng, image)
            _save(image, images / f"{index:03d}.png")


def good_image(rng: np.random.Generator, texture: np.ndarray) -> np.ndarray:
    """Cut a piece out of a texture at a random place, slightly turned, with a little change of light.

    Args:
        rng (np.random.Generator): Source of randomness.
        texture (np.ndarray): Grey photograph of shape ``(H, W)``, values in [0, 1], each side above 360.

    Returns:
        np.ndarray: Image of shape ``(256, 256)`` with values in [0, 1].
    """
    # The diagonal of the crop must fit into the photograph at any small angle.
    turned = transform.rotate(texture, rng.uniform(-4, 4), mode="reflect")
    top, left = rng.integers(20, np.array(texture.shape) - SIZE - 20)
    crop = turned[top : top + SIZE, left : left + SIZE]
    return np.clip(crop * rng.uniform(0.92, 1.08), 0, 1)


def change_light(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Dim an image by 5 to 20 %, and let the light fall off by up to 15 % more across it, in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.sin(angle) * np.linspace(-1, 1, SIZE)[:, None] + np.cos(angle) * np.linspace(-1, 1, SIZE)
    return image * rng.uniform(0.8, 0.95) * (1 - rng.uniform(0, 0.15) * (slope / np.abs(slope).max() + 1) / 2)


def _blob(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Return the boolean support, of shape ``(256, 256)``, of an irregular round region inside the image."""
    row, column = rng.uniform(radius * 1.4, SIZE - radius * 1.4, 2)
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    # Three harmonics with random phases make the outline irregular, and smooth.
    waves = sum(rng.uniform(0, 0.3 / k) * np.sin(k * angles + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    reach = radius * (1 + waves)
    return draw.polygon2mask((SIZE, SIZE), np.stack([row + reach * np.sin(angles), column + reach * np.cos(angles)], 1))


def _blend(image: np.ndarray, paint: np.ndarray | float, support: np.ndarray, softness: float) -> np.ndarray:
    """Paint inside a support, with a soft edge that never leaves it."""
    alpha = np.clip(2 * gaussian_filter(support.astype(float), softness) - 1, 0, 1) if softness else support
    return np.clip(image * (1 - alpha) + paint * alpha, 0, 1)


def scratch(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw a thin, slightly bent line, brighter or darker than its surroundings."""
    middle, angle = rng.uniform(70, SIZE - 70, 2), rng.uniform(0, np.pi)
    half = rng.uniform(30, 60) * np.array([np.sin(angle), np.cos(angle)])
    bend = rng.uniform(-15, 15) * np.array([np.cos(angle), -np.sin(angle)])
    points = np.array([middle - half, middle + bend, middle + half]).round().astype(int)
    support = np.zeros((SIZE, SIZE), bool)
    (r0, c0), (r1, c1), (r2, c2) = points
    support[draw.bezier_curve(r0, c0, r1, c1, r2, c2, weight=1)] = True
    support = gaussian_filter(support.astype(float), rng.uniform(0.9, 1.5)) > 0.08
    return _blend(image, 0.95 if rng.random() < 0.5 else 0.05, support, softness=0.0), support


def stain(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Darken a region, as a fluid does; the texture shows through."""
    support = _blob(rng, rng.uniform(18, 36))
    return _blend(image, image * rng.uniform(0.35, 0.55), support, softness=2.0), support


def dent(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Light one side of a hollow and shade the other."""
    support = _blob(rng, rng.uniform(18, 34))
    depth = gaussian_filter(support.astype(float), 6.0)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.sin(angle) * np.gradient(depth, axis=0) + np.cos(angle) * np.gradient(depth, axis=1)
    smooth = 0.5 * image + 0.5 * gaussian_filter(image, 2.0)
    return _blend(image, smooth + 0.45 * slope / np.abs(slope).max(), support, softness=1.0), support


def hole(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take a piece of the surface away: what lies below is dark and almost even."""
    support = _blob(rng, rng.uniform(12, 28))
    floor = 0.12 + 0.04 * zoom(rng.random((9, 9)), SIZE / 9, order=1)
    return _blend(image, floor, support, softness=1.0), support


def foreign(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay a piece of another material on the surface, cut out of a photograph of coffee."""
    support = _blob(rng, rng.uniform(14, 30))
    other = rgb2gray(data.coffee())
    top, left = rng.integers(0, np.array(other.shape) - SIZE)
    return _blend(image, other[top : top + SIZE, left : left + SIZE], support, softness=1.0), support


DEFECTS = {"dent": dent, "foreign": foreign, "hole": hole, "scratch": scratch, "stain": stain}


def _save(image: np.ndarray, path: Path) -> None:
    Image.fromarray((np.asarray(image, dtype=float) * 255).round().astype(np.uint8)).save(path)
