# SPDX-License-Identifier: Apache-2.0

"""Tests of the data module for folders like MVTec AD's."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from anomalib_dhkd import MVTec


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A category with two defects, and a mask of each."""
    for name in ("train/good", "test/good", "test/bent", "test/cut"):
        for number in range(2):
            file = tmp_path / "transistor" / name / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(file)
            if name in {"test/bent", "test/cut"}:
                mask = tmp_path / "transistor" / "ground_truth" / file.parent.name / f"{number:03}_mask.png"
                mask.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (8, 8)).save(mask)
    return tmp_path


def test_masks_of_all_defects(root: Path) -> None:
    datamodule = MVTec(root=root, category="transistor")
    datamodule.setup()
    assert len(datamodule.test_data) == 6


@pytest.mark.parametrize(("gone", "count", "first"), [("cut", 2, "cut"), ("", 4, "bent")])
def test_defects_without_masks_are_named(gone: str, count: int, first: str, root: Path) -> None:
    shutil.rmtree(root / "transistor" / "ground_truth" / gone)
    image = re.escape(str(root / "transistor" / "test" / first / "000.png"))
    with pytest.raises(ValueError, match=rf"{count} have none: {image} is the first.*Folder without mask_dir"):
        MVTec(root=root, category="transistor").setup()
