# SPDX-License-Identifier: Apache-2.0

"""Where the pictures of predictions go."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.utils.path import generate_output_filename
from torchvision.utils import save_image

from anomalib_dhkd import Quickstart
from anomalib_dhkd.visualizer import PathVisualizer
from tests.helpers import Trained

LINES = ("lineA/ok/000.png", "lineB/ok/000.png", "lineB/ok/001.png")


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with images of two lines that have the same names, from the working directory."""
    for name in LINES:
        (tmp_path / "lines" / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 48, 48), tmp_path / "lines" / name)
    monkeypatch.chdir(tmp_path)
    return Path("lines")


def _written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_predicted_pictures_follow_the_images_paths(
    trained: Trained, lines: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="anomalib_dhkd"):
        batches = trained.engine.predict(model=trained.model, data_path=lines) or []
    (images,) = tmp_path.rglob("images")
    assert _written(images) == [f"lines/{name}" for name in LINES]
    anomalous = sum(int(batch.pred_label.sum()) for batch in batches)
    assert caplog.messages[-1] == f"Predicted 3 images, {anomalous} of them anomalous. Pictures: {images}"
    trained.model.post_processor.enable_thresholding = False
    with caplog.at_level("INFO", logger="anomalib_dhkd"):
        trained.engine.predict(model=trained.model, data_path=lines)
    assert caplog.messages[-1] == f"Predicted 3 images. Pictures: {images}"


def test_a_line_a_run_overwrites_nothing(trained: Trained, lines: Path, tmp_path: Path) -> None:
    for line in ("lineA", "lineB"):
        trained.engine.predict(model=trained.model, data_path=tmp_path / lines / line / "ok" / "000.png")
    (images,) = tmp_path.rglob("images")
    assert _written(images) == [f"lines/{name}" for name in LINES[:2]]


def test_pictures_of_a_data_module_keep_anomalibs_names(
    trained: Trained, quickstart: Quickstart, tmp_path: Path
) -> None:
    trained.engine.test(model=trained.model, datamodule=quickstart, verbose=False)
    (images,) = tmp_path.rglob("images")
    expected = [
        generate_output_filename(path, images, quickstart.name, quickstart.category, mkdir=False)
        for path in quickstart.test_data.samples.image_path
    ]
    assert _written(images) == sorted(str(path.relative_to(images)) for path in expected)


def test_names_of_a_data_module_that_collide(lines: Path) -> None:
    visualizer = PathVisualizer(output_dir="pictures")
    datamodule = SimpleNamespace(name="Folder", category="")
    for _ in range(2):  # the second time, each image has the name that it had
        found = [str(visualizer.file_of(lines / name, datamodule)) for name in LINES]
        assert found == ["pictures/ok/000.png", "pictures/lines/lineB/ok/000.png", "pictures/ok/001.png"]


@pytest.mark.usefixtures("lines")
def test_no_path_leads_out_of_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    file = PathVisualizer(output_dir="pictures").file_of("../lines/lineA/ok/000.png", None)
    assert file == Path("pictures") / tmp_path.relative_to("/") / "lines/lineA/ok/000.png"
