# SPDX-License-Identifier: Apache-2.0

"""What is noticed about the images of a training."""

from pathlib import Path

import numpy as np
import pytest
from anomalib.data import Folder
from PIL import Image

from anomalib_dhkd import Quickstart
from anomalib_dhkd.data_check import check_data


def _parts(folder: Path) -> Folder:
    """Write six good images, two of them to test with, and two others; return a data module of them."""
    generator = np.random.default_rng(0)
    for name, count in (("good", 4), ("good_test", 2), ("bad", 2)):
        (folder / name).mkdir()
        for number in range(count):
            pixels = generator.integers(60, 180, (48, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return Folder(
        name="parts", root=folder, normal_dir="good", normal_test_dir="good_test", abnormal_dir="bad", num_workers=0
    )


def _warnings(datamodule: Folder) -> list[str]:
    datamodule.setup()
    return check_data(datamodule).warnings


def test_counts(quickstart: Quickstart) -> None:
    quickstart.prepare_data()
    quickstart.setup()
    found = check_data(quickstart)
    assert found.warnings == []
    assert found.size == (256, 256)
    rows = found.counts.set_index("").T.to_dict()
    assert rows.keys() == {"train", "val", "test"}
    assert rows["train"] == {
        "images": 8, "good": 8, "defective": 0, "masks": 0, "width x height": "256 x 256", "format": "PNG L",
    }  # fmt: skip
    assert rows["test"] == rows["train"] | {"images": 12, "good": 2, "defective": 10, "masks": 10}


def test_nothing_to_warn_of(tmp_path: Path) -> None:
    assert _warnings(_parts(tmp_path)) == []


def test_copies(tmp_path: Path) -> None:
    datamodule = _parts(tmp_path)
    (tmp_path / "good" / "copy.png").write_bytes((tmp_path / "good" / "0.png").read_bytes())
    (tmp_path / "good_test" / "leak.png").write_bytes((tmp_path / "good" / "1.png").read_bytes())
    (warning,) = _warnings(datamodule)
    assert "2 images are there more than once" in warning
    assert "1 of them are trained on and tested on" in warning


def test_same_size_is_no_copy(tmp_path: Path) -> None:
    datamodule = _parts(tmp_path)
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))
        path.unlink()
    assert len({path.stat().st_size for path in tmp_path.rglob("*.bmp")}) == 1
    assert _warnings(datamodule) == []


def test_mixed_sizes_and_formats(tmp_path: Path) -> None:
    datamodule = _parts(tmp_path)
    Image.new("L", (100, 80), 120).save(tmp_path / "good" / "other.jpg")
    sizes, formats = _warnings(datamodule)
    assert "different sizes" in sizes
    assert "different formats or colours" in formats
    found = check_data(datamodule)
    assert found.size == (64, 48)
    assert found.counts["format"][0] == "PNG RGB, JPEG L"
    assert found.counts["width x height"][0] == "64 x 48, 100 x 80"


@pytest.mark.parametrize(("factors", "expected"), [((0.5, 0.5, 0.5), "red 50 %"), ((1.0, 1.0, 1.4), "blue 140 %")])
def test_another_light(factors: tuple[float, ...], expected: str, tmp_path: Path) -> None:
    datamodule = _parts(tmp_path)
    for path in (tmp_path / "good_test").iterdir():
        pixels = np.asarray(Image.open(path)) * np.array(factors)
        Image.fromarray(pixels.round().astype(np.uint8)).save(path)
    (warning,) = _warnings(datamodule)
    assert "another light than training images" in warning
    assert expected in warning


def test_light_of_defects_is_no_warning(tmp_path: Path) -> None:
    datamodule = _parts(tmp_path)
    for path in (tmp_path / "bad").iterdir():
        Image.new("RGB", (64, 48)).save(path)
    assert not [warning for warning in _warnings(datamodule) if "light" in warning]


def test_no_files() -> None:
    found = check_data(None)
    assert found.counts.empty
    assert found.size is None
    assert found.warnings == []
