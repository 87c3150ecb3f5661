# SPDX-License-Identifier: Apache-2.0

"""The documentation's pictures; those of a benchmark's results are tested with the benchmark."""

import re
from pathlib import Path

import matplotlib as mpl
import pytest
from pictures import STYLE, draw_architecture, write_pictures

from anomalib_dhkd import Dhkd
from tests.helpers import REPOSITORY


def _texts(file: Path) -> list[str]:
    return re.findall(r"<text [^>]*>(.*)</text>", file.read_text())


def _draw(model: Dhkd, file: Path) -> list[str]:
    with mpl.rc_context(STYLE):
        draw_architecture(model).savefig(file)
    return _texts(file)


def test_the_picture_is_that_of_the_model(tmp_path: Path) -> None:
    """After a change of the model: `make pictures`."""
    assert _texts(REPOSITORY / "docs" / "pictures" / "architecture.svg") == _draw(Dhkd(), tmp_path / "drawn.svg")


def test_another_model_gives_another_picture(tmp_path: Path) -> None:
    model = Dhkd(
        backbone="resnet18",
        layers=["layer1", "layer2", "layer3"],
        width=8,
        flow_steps=1,
        student_blocks=2,
        noise_std=0.5,
        num_gaussians=16,
        image_score="max",
        num_views=5,
        train_steps=7,
        pre_processor=Dhkd.configure_pre_processor((64, 96)),
    )
    texts = _draw(model, tmp_path / "drawn.svg")
    for number, text in (
        (2, "64 x 96 pixels"),
        (1, "5 of each training image"),
        (1, "resnet18"),
        (1, "layer1: 64 channels at 16 x 24 positions"),
        (1, "layer2: 128 channels at 8 x 12 positions"),
        (1, "layer3: 256 channels at 4 x 6 positions"),
        (2, "1 coupling"),
        (2, "2 blocks"),
        (2, "width 8 and 16"),
        (2, "width 32"),
        (2, "Noise 0.5"),
        (1, "difference, layer1, layer2"),
        (1, "difference, layer3"),
        (2, "16 local Gaussians"),
        (2, "over 448 channels"),
        (1, "highest value of the map"),
        (1, "trained, 7 steps, teacher first"),
    ):
        assert texts.count(text) == number, text
    assert [text for text in texts if text.endswith("%")] == ["10 %", "40 %", "20 %", "30 %"]
    for default in ("blocks", "384", "320", "180", "400", "0.2"):
        assert not [text for text in texts if default in text and text != "2 blocks"]


def test_one_layer(tmp_path: Path) -> None:
    texts = _draw(Dhkd(layers=["blocks.4"]), tmp_path / "drawn.svg")
    assert texts.count("Teacher") == 1
    assert [text for text in texts if text.endswith("%")] == ["44 %", "22 %", "33 %"]


@pytest.mark.parametrize(
    ("tables", "missing"), [((), "results.csv, robustness.csv, inference.csv"), (("results.csv",), "robustness.csv")]
)
def test_results_that_are_missing_are_named(tables: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    for name in tables:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=f"results must be .* got .*{tmp_path.name}, which lacks {missing}"):
        write_pictures(tmp_path, tmp_path / "pictures")
    assert [file.name for file in (tmp_path / "pictures").iterdir()] == ["architecture.svg"]
