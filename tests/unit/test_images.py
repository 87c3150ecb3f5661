# SPDX-License-Identifier: Apache-2.0

"""Files and arrays as an exported model takes them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import pytest
import tifffile
from anomalib.data.utils import read_image
from PIL import Image

from anomalib_dhkd.images import as_input, read

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


LIKE_ENGINE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rgb.png": (lambda path: Image.fromarray(RGB).save(path), ""),
    "rgb.jpg": (lambda path: Image.fromarray(RGB).save(path), ""),
    "rgb.bmp": (lambda path: Image.fromarray(RGB).save(path), ""),
    "rgb.webp": (lambda path: Image.fromarray(RGB).save(path), ""),
    "upright.jpg": (lambda path: Image.fromarray(RGB).save(path, exif=_exif(1)), ""),
    "turned.jpg": (
        lambda path: Image.fromarray(RGB).save(path, exif=_exif(6)),
        "EXIF orientation 6 not applied, as in training",
    ),
    "grey.png": (lambda path: Image.fromarray(GREY).save(path), "L converted to RGB"),
    "binary.png": (lambda path: Image.fromarray(GREY > 99).save(path), "1 converted to RGB"),
    "palette.png": (lambda path: Image.fromarray(RGB).quantize(16).save(path), "P converted to RGB"),
    "clear.png": (
        lambda path: Image.fromarray(RGB).quantize(16).save(path, transparency=0),
        "P converted to RGB; alpha dropped",
    ),
    "rgba.png": (
        lambda path: Image.fromarray(np.dstack([RGB, GREY])).save(path),
        "RGBA converted to RGB; alpha dropped",
    ),
    "la.png": (
        lambda path: Image.fromarray(np.dstack([GREY, GREY]), "LA").save(path),
        "LA converted to RGB; alpha dropped",
    ),
    "cmyk.jpg": (lambda path: Image.fromarray(RGB).convert("CMYK").save(path), "CMYK converted to RGB"),
    "ycbcr.tif": (lambda path: Image.fromarray(RGB).convert("YCbCr").save(path), "YCbCr converted to RGB"),
    "pages.tif": (
        lambda path: Image.fromarray(RGB).save(path, save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        "first of 2 images in the file",
    ),
    "rgb16.png": (
        lambda path: cv2.imwrite(str(path), RGB[..., ::-1].astype(np.uint16) * 257),
        "upper 8 of 16 bits a channel, as in training",
    ),
    "rgb16.tif": (
        lambda path: tifffile.imwrite(path, RGB.astype(np.uint16) * 257, photometric="rgb"),
        "upper 8 of 16 bits a channel, as in training",
    ),
}


@pytest.mark.parametrize("name", LIKE_ENGINE)
def test_files_are_read_as_engine_reads_them(name: str, tmp_path: Path) -> None:
    if name == "ycbcr.tif" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow reads YCbCr without compression from version 13 on, which needs Python 3.11.")
    write, note = LIKE_ENGINE[name]
    write(tmp_path / name)
    image, notes = read(tmp_path / name)
    assert image.shape == (1, 3, 20, 30)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[0], read_image(tmp_path / name, as_tensor=True).numpy(), atol=1e-6)
    assert "; ".join(notes) == note


@pytest.mark.parametrize("name", ["grey.png", "little.tif", "big.tif", "grey.pgm"])
def test_16_bit_grey_keeps_its_range(name: str, tmp_path: Path) -> None:
    values = GREY.astype(np.uint16) * 257 + 3
    if name == "big.tif":
        tifffile.imwrite(tmp_path / name, values, byteorder=">")
    else:
        cv2.imwrite(str(tmp_path / name), values)
    image, notes = read(tmp_path / name)
    np.testing.assert_allclose(image, np.broadcast_to(values / 65535, (1, 3, 20, 30)), atol=1e-6)
    assert notes == ["grey repeated in three channels", "16 bits divided by 65535"]
    assert (read_image(tmp_path / name) == 1).mean() > 0.95  # anomalib cuts at 255


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GREY / np.float32(255), "The image holds floating-point numbers, whose range isn't known"),
        (GREY.astype(np.uint32), "The image holds signed or 32-bit integers, whose range isn't known"),
        (GREY.astype(np.int16), "The image holds signed or 32-bit integers, whose range isn't known"),
    ],
)
def test_a_file_of_unknown_range_is_refused(values: np.ndarray, message: str, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "image.tif", values)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "image.tif")


def test_arrays_of_a_camera() -> None:
    expected = RGB.transpose(2, 0, 1)[None] / np.float32(255)
    repeated = expected[:, :1].repeat(3, axis=1)
    for array, order, wanted, notes in [
        (RGB, "RGB", expected, []),
        (RGB[..., ::-1], "BGR", expected, []),
        (np.dstack([RGB, GREY]), "RGB", expected, ["alpha dropped"]),
        (cv2.cvtColor(RGB, cv2.COLOR_RGB2BGRA), "BGR", expected, ["alpha dropped"]),
        (GREY, "BGR", repeated, ["grey repeated in three channels"]),
        (GREY[..., None], "RGB", repeated, ["grey repeated in three channels"]),
        (RGB.astype(np.uint16) * 257, "RGB", expected, ["16 bits divided by 65535"]),
    ]:
        image, found = as_input(array, order)
        np.testing.assert_allclose(image, wanted, atol=1e-6)
        assert image.dtype == np.float32
        assert image.flags.c_contiguous
        assert found == notes


@pytest.mark.parametrize(
    ("array", "order", "message"),
    [
        (
            RGB / 255,
            "RGB",
            "array must be of type uint8 or uint16, because the range of others isn't known, got float64",
        ),
        (RGB.astype(np.int32), "RGB", "array must be of type uint8 or uint16"),
        (GREY > 99, "RGB", "array must be of type uint8 or uint16"),
        (RGB[..., :2], "RGB", "array must be of shape (H, W) or (H, W, C) with 1, 3 or 4 channels, got (20, 30, 2)"),
        (RGB[None], "RGB", "array must be of shape (H, W) or (H, W, C)"),
        (RGB[:0], "RGB", "array must be of shape (H, W) or (H, W, C)"),
        (RGB, "GBR", "order must be 'RGB' or 'BGR', got 'GBR'"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, order: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        as_input(array, order)
