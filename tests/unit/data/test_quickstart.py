# SPDX-License-Identifier: Apache-2.0

"""The quickstart data set."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from anomalib_dhkd import Quickstart
from anomalib_dhkd.data.quickstart import CATEGORIES, DEFECTS, good_image, write_category


def _digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()


def test_same_seed_same_images_other_seed_others(tmp_path: Path) -> None:
    for name, seed in (("first", 0), ("second", 0), ("third", 1)):
        write_category(tmp_path / name, "brick", num_train=2, num_test=1, seed=seed)
    first, second, third = (_digest(tmp_path / name) for name in ("first", "second", "third"))
    assert first == second
    assert first != third


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("kind", sorted(DEFECTS))
def test_masks_are_exact(category: str, kind: str) -> None:
    texture = getattr(data, category)() / 255.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image = good_image(rng, texture)
        defective, mask = DEFECTS[kind](rng, image)
        changed = np.abs((defective * 255).round() - (image * 255).round()) > 0
        assert defective.min() >= 0
        assert defective.max() <= 1
        assert mask.dtype == bool
        assert not (changed & ~mask).any(), "a change outside the mask"
        assert 60 <= mask.sum() <= mask.size * 0.15
        # Inside, a few pixels may happen to keep their grey value.
        assert changed[mask].mean() > 0.8
        assert np.abs(defective - image)[mask].mean() > 0.03, "too faint to see"


def test_datamodule(quickstart: Quickstart) -> None:
    quickstart.prepare_data()
    quickstart.setup()
    assert len(quickstart.train_data) == 8
    assert len(quickstart.test_data) == 2 * (1 + len(DEFECTS))
    labels = [bool(item.gt_label) for item in quickstart.test_data]
    masks = [bool(item.gt_mask.any()) for item in quickstart.test_data]
    assert labels == masks
    assert sum(labels) == 2 * len(DEFECTS)
    assert quickstart.train_data[0].image.shape == (3, 256, 256)


def test_images_are_written_once(quickstart: Quickstart) -> None:
    quickstart.prepare_data()
    path = quickstart.root / "brick" / "train" / "good" / "000.png"
    before = path.stat().st_mtime_ns
    quickstart.prepare_data()
    assert path.stat().st_mtime_ns == before


def test_changed_light_is_that_of_the_test_images_alone(tmp_path: Path) -> None:
    for name, changed_light in (("as it is", False), ("changed", True)):
        write_category(tmp_path / name, "brick", num_train=2, num_test=2, seed=0, changed_light=changed_light)
    before, after = tmp_path / "as it is", tmp_path / "changed"
    for part in ("train", "ground_truth"):
        assert _digest(before / part) == _digest(after / part)
    paths = sorted(path.relative_to(before) for path in (before / "test").rglob("*.png"))
    assert len(paths) == 2 * (1 + len(DEFECTS))
    for path in paths:
        one, other = (np.asarray(Image.open(folder / path), dtype=float) for folder in (before, after))
        assert 0.68 < other.mean() / one.mean() < 0.96
        assert np.corrcoef(one.flatten(), other.flatten())[0, 1] > 0.9
    folders = {Quickstart(root=tmp_path, changed_light=changed_light).root for changed_light in (False, True)}
    assert len(folders) == 2


def test_an_interrupted_run_leaves_no_half_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        (args[0] / "train").mkdir()
        raise KeyboardInterrupt

    datamodule = Quickstart(root=tmp_path, num_train=1, num_test=1)
    with monkeypatch.context() as patch:
        patch.setattr("anomalib_dhkd.data.quickstart.write_category", interrupted)
        with pytest.raises(KeyboardInterrupt):
            datamodule.prepare_data()
    datamodule.prepare_data()
    mask = Image.open(datamodule.root / "brick" / "ground_truth" / "stain" / "000_mask.png")
    assert set(np.unique(mask)) == {0, 255}


def test_two_at_once_write_one_data_set(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: Quickstart(root=tmp_path, num_train=4, num_test=1).prepare_data(), range(2)):
            pass
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["brick"]
    assert len(list(folder.rglob("*.png"))) == 4 + 6 + 5


@pytest.mark.parametrize(("argument", "value"), [("category", "bottle"), ("num_train", 0), ("num_test", -1)])
def test_bad_arguments(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be .* got {value!r}"):
        Quickstart(**{argument: value})
