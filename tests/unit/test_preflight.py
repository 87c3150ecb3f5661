# SPDX-License-Identifier: Apache-2.0

"""What would lose a training is refused before it begins."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_dhkd import Dhkd, Quickstart
from anomalib_dhkd.preflight import unreadable
from tests.helpers import SMALL, Trained, fit, small_dhkd


def _write(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with four good images and two others."""
    _write(tmp_path / "parts" / "good", 4)
    _write(tmp_path / "parts" / "bad", 2)
    return tmp_path / "parts"


def _data(folder: Path, **changes: Any) -> Folder:
    arguments = {"normal_dir": "good", "abnormal_dir": "bad", "val_split_mode": "same_as_test"} | changes
    return Folder(name="parts", root=folder, train_batch_size=2, seed=0, **{"num_workers": 0} | arguments)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_other_precisions_are_refused_by_name(precision: str, quickstart: Quickstart, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"precision must be one of 32-true, 16-mixed, bf16-mixed, got {precision}"):
        fit(quickstart, tmp_path, small_dhkd(), precision=precision)


def test_other_precisions_are_refused_on_a_trained_model_too(trained: Trained, tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path, precision="bf16-true")
    with pytest.raises(ValueError, match=r"got bf16-true"):
        engine.test(model=Dhkd(**SMALL), datamodule=trained.datamodule, ckpt_path=trained.checkpoint)


def test_no_validation_split_is_refused(quickstart_root: Path, tmp_path: Path) -> None:
    datamodule = Quickstart(root=quickstart_root, num_train=8, num_test=2, num_workers=0, val_split_mode="none")
    with pytest.raises(ValueError, match=r"val_split_mode must be one of 'same_as_test'.* got 'none'"):
        fit(datamodule, tmp_path, small_dhkd())


def test_no_validation_batches_are_refused(quickstart: Quickstart, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"limit_val_batches must be above 0 .* got limit_val_batches=0"):
        fit(quickstart, tmp_path, small_dhkd(), limit_val_batches=0)


def test_no_validation_dataloader_is_refused(quickstart: Quickstart, tmp_path: Path) -> None:
    quickstart.setup()
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    with pytest.raises(ValueError, match="a validation dataloader given"):
        engine.fit(model=small_dhkd(), train_dataloaders=quickstart.train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("cache_limit", [2.0, None])
def test_a_broken_training_image_is_named(
    num_workers: int, cache_limit: float | None, folder: Path, tmp_path: Path
) -> None:
    broken = folder / "good" / "2.png"
    _truncate(broken)
    message = f"The image {broken} can't be read: image file is truncated"
    with pytest.raises(OSError, match=message) as error:
        fit(_data(folder, num_workers=num_workers), tmp_path, small_dhkd(cache_limit=cache_limit))
    # The end of a traceback is what is read, and a worker process' error has another traceback before it.
    assert str(error.value).splitlines()[-1].startswith(message)


def test_a_broken_validation_image_is_named_before_training(folder: Path, tmp_path: Path) -> None:
    _truncate(folder / "bad" / "1.png")
    with pytest.raises(OSError, match=rf"The image {folder}/bad/1.png can't be read"):
        fit(_data(folder), tmp_path, small_dhkd())
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_broken_test_image_is_named_and_the_model_stays(folder: Path, tmp_path: Path) -> None:
    _truncate(folder / "bad" / "1.png")
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    with pytest.raises(OSError, match=rf"The image {folder}/bad/1.png can't be read"):
        engine.train(model=small_dhkd(train_steps=2), datamodule=_data(folder, val_split_mode="from_train"))
    assert Dhkd.load_from_checkpoint(engine.best_model_path).finished


def test_a_broken_image_to_predict_is_named(trained: Trained, folder: Path) -> None:
    _truncate(folder / "bad" / "1.png")
    with pytest.raises(OSError, match=rf"The image {folder}/bad/1.png can't be read"):
        trained.engine.predict(model=trained.model, data_path=folder / "bad", ckpt_path=trained.checkpoint)


def test_whole_images_of_all_kinds_are_readable(tmp_path: Path) -> None:
    for mode, suffix in (("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png"), ("1", "tiff")):
        Image.new(mode, (8, 8)).save(tmp_path / f"{mode}.{suffix}")
    assert unreadable(map(str, tmp_path.iterdir())) == ""


@pytest.mark.parametrize(
    ("values", "name", "mode"),
    [
        (np.full((64, 64), 40_000, np.uint16), "deep.png", "I;16"),
        (np.full((64, 64), 0.5, np.float32), "deep.tiff", "F"),
    ],
)
def test_images_that_would_be_clipped_are_refused(
    values: np.ndarray, name: str, mode: str, trained: Trained, folder: Path, tmp_path: Path
) -> None:
    file = folder / "good" / name
    Image.fromarray(values).save(file)
    message = f"The image {file} must have 8 bits a channel, got pillow's mode {mode}"
    with pytest.raises(OSError, match=message):
        fit(_data(folder), tmp_path, small_dhkd())
    arguments: dict[str, Any] = {"model": trained.model, "ckpt_path": trained.checkpoint}
    for run in (trained.engine.test, trained.engine.validate):
        with pytest.raises(OSError, match=message):
            run(**arguments, datamodule=_data(folder))
    with pytest.raises(OSError, match=message):
        trained.engine.predict(**arguments, data_path=folder / "good")
