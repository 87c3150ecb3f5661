# SPDX-License-Identifier: Apache-2.0

"""What the parts of a model make of an image, and the subcommand that shows it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import ImageItem
from PIL import Image

from anomalib_dhkd import Dhkd, InsideVisualizer, Quickstart
from anomalib_dhkd.__main__ import DhkdCLI
from anomalib_dhkd.explain import colours, good_scores, look_inside
from tests.helpers import Trained, fit, small_dhkd

OLD = Path(__file__).parents[1] / "checkpoints" / "0.1.0.ckpt"


def _explain(capsys: pytest.CaptureFixture[str], checkpoint: Path, data: Path, folder: Path) -> Path:
    """Run the subcommand and return the path that it ends with."""
    DhkdCLI(["explain", "--ckpt_path", str(checkpoint), "--data", str(data), "--default_root_dir", str(folder)])
    return Path(capsys.readouterr().out.strip().splitlines()[-1].removeprefix("Written: "))


def test_equal_answers_have_equal_colours() -> None:
    teacher = np.random.default_rng(0).normal(size=(10, 12, 16))
    student = teacher.copy()
    student[3, 4] += 5
    one, other = colours([teacher, student])
    assert one.shape == (10, 12, 3)
    assert one.min() == 0
    assert one.max() == 1
    differs = (abs(one - other) > 1e-6).any(axis=-1)
    assert differs[3, 4]
    assert differs.sum() == 1


@pytest.mark.parametrize(("shape", "count"), [((1, 1, 8), 1), ((4, 4, 2), 2)])
def test_colours_of_few_vectors_or_channels(shape: tuple[int, ...], count: int) -> None:
    maps = colours([np.random.default_rng(seed).normal(size=shape) for seed in (0, 1)])
    assert [(np.ptp(np.stack(maps)[..., component]) > 0.01) for component in range(3)] == [i < count for i in range(3)]


def test_both_parts_are_normalised_like_the_map(trained: Trained) -> None:
    model = trained.model
    image = model.pre_processor(trained.datamodule.test_data[0].image[None])[0]
    model.train()
    halves, answers = look_inside(model, image)
    assert model.model.training
    model.eval()
    with torch.no_grad():
        whole = model(image[None]).anomaly_map[0, 0].numpy()
    assert list(halves) == ["fine", "coarse"]
    assert all(half.shape == whole.shape and 0 <= half.min() < half.max() <= 1 for half in halves.values())
    # The whole lies between its parts.
    low, high = np.minimum(*halves.values()), np.maximum(*halves.values())
    assert (low - 1e-4 <= whole).all()
    assert (whole <= high + 1e-4).all()
    assert [name.split(",")[0] for name in answers] == ["Teacher", "Student"] * 2
    assert [values.shape for values in answers.values()] == [(40, 40, 3)] * 2 + [(20, 20, 3)] * 2


def test_good_scores_are_those_of_the_good_validation_images(trained: Trained) -> None:
    with torch.no_grad():
        scores = [
            float(trained.model(item.image[None]).pred_score)
            for item in trained.datamodule.val_data
            if not item.gt_label
        ]
    found, threshold = good_scores(trained.model.post_processor)
    assert len(scores) == 2
    assert found.tolist() == pytest.approx(sorted(scores), abs=1e-5)
    assert threshold == 0.5
    trained.model.post_processor.image_sensitivity = 0.4
    assert good_scores(trained.model.post_processor)[1] == pytest.approx(0.6)


def test_explain_an_image_and_a_folder(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = trained.datamodule.root / "brick" / "test" / "stain"
    written = _explain(capsys, trained.checkpoint, folder / "000.png", tmp_path / "one")
    assert written.is_relative_to(tmp_path / "one" / "Dhkd" / "latest" / "explanations")
    picture = Image.open(written)
    assert picture.size == (3 * 256, 3 * 256)
    below = np.asarray(picture)[256:]
    assert below.std() > 10
    written = _explain(capsys, trained.checkpoint, folder, tmp_path / "all")
    assert sorted(path.name for path in written.rglob("*.png")) == ["000.png", "001.png"]


def test_a_checkpoint_without_good_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (60, 40), 100).save(tmp_path / "grey $x$.png")
    assert good_scores(Dhkd.load_from_checkpoint(OLD).post_processor)[0].tolist() == []
    assert _explain(capsys, OLD, tmp_path / "grey $x$.png", tmp_path / "results").is_file()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"student_blocks": 0}, ["Teacher, blocks.2", "Teacher, blocks.4"]),
        ({"flow_steps": 0, "layers": ["blocks.2"], "num_gaussians": 0}, ["Teacher, blocks.2", "Student, blocks.2"]),
        (
            {"post_processor": False},
            ["Teacher, blocks.2", "Student, blocks.2", "Teacher, blocks.4", "Student, blocks.4"],
        ),
    ],
)
def test_models_without_a_part(
    changes: dict[str, Any],
    expected: list[str],
    quickstart: Quickstart,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = small_dhkd(train_steps=2, **changes)
    engine, _ = fit(quickstart, tmp_path, model)
    _, answers = look_inside(model, torch.rand(3, 64, 64))
    assert list(answers) == expected
    image = Path(quickstart.test_data.samples.image_path[0])
    assert _explain(capsys, Path(engine.best_model_path), image, tmp_path / "results").is_file()


def test_a_test_has_the_ground_truth_too(trained: Trained, tmp_path: Path) -> None:
    trained.model.visualizer = InsideVisualizer(field_size=(96, 96), output_dir=tmp_path / "pictures")
    trained.engine.test(model=trained.model, datamodule=trained.datamodule, verbose=False)
    pictures = [Image.open(path) for path in (tmp_path / "pictures").rglob("*.png")]
    assert len(pictures) == len(trained.datamodule.test_data)
    assert {picture.size for picture in pictures} == {(4 * 96, 3 * 96)}


def test_a_visualizer_needs_a_model() -> None:
    with pytest.raises(ValueError, match=r"model must be set .* got None"):
        InsideVisualizer().visualize(ImageItem(image=torch.rand(3, 8, 8)))


@pytest.mark.parametrize(
    ("checkpoint", "data", "error", "message"),
    [
        ("no.ckpt", "good.png", ValueError, "ckpt_path must be the file of a checkpoint, got .*no.ckpt"),
        ("text.png", "good.png", ValueError, "ckpt_path must be a checkpoint of Dhkd, got .*text.png: UnpicklingError"),
        ("other.ckpt", "good.png", ValueError, "ckpt_path must be a checkpoint of Dhkd, got .*other.ckpt: KeyError"),
        ("unfinished.ckpt", "good.png", RuntimeError, "unfinished training"),
        ("", "no.png", ValueError, "data must be an image or a folder of images, got .*no.png"),
        ("", "other.ckpt", ValueError, "data must be an image or a folder of images, got .*other.ckpt"),
        ("", "text.png", OSError, "The image .*text.png can't be read"),
        ("", "deep.png", OSError, "The image .*deep.png must have 8 bits a channel"),
        ("", "empty", ValueError, "Found 0 images in .*empty"),
    ],
)
def test_bad_input_is_named(
    checkpoint: str, data: str, error: type[Exception], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    Image.fromarray(np.full((40, 40), 60_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    content = torch.load(OLD, weights_only=True)
    content["dhkd_training"]["calibrated_step"] = -1
    torch.save(content, tmp_path / "unfinished.ckpt")
    with pytest.raises(error, match=message):
        _explain(capsys, tmp_path / checkpoint if checkpoint else OLD, tmp_path / data, tmp_path / "results")
    assert not list((tmp_path / "results").rglob("*.png"))
