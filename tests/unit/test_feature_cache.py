# SPDX-License-Identifier: Apache-2.0

"""Kept features: what the data set gives back, and what a training does with it."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_dhkd import Quickstart
from anomalib_dhkd.feature_cache import FeatureDataset
from tests.helpers import fit, mounted, small_dhkd


@pytest.mark.parametrize(("limit", "in_file"), [(1.0, False), (0.0, True)])
def test_gives_back_what_it_was_given(limit: float, in_file: bool) -> None:
    features = [torch.randn(5, 6, 4, 3), torch.randn(5, 8, 2, 2)]
    kept = FeatureDataset(5, limit)
    for part in (slice(0, 2), slice(2, 5)):
        kept.append([scale[part] for scale in features])
    assert (kept.file is not None) == in_file
    loader = DataLoader(kept, batch_size=2, collate_fn=kept.collate_fn)
    for values in ([batch.features for batch in loader], list(kept.batches(2))):
        assert [len(batch[0]) for batch in values] == [2, 2, 1]
        for scale, feature in enumerate(features):
            torch.testing.assert_close(torch.cat([batch[scale] for batch in values]), feature, rtol=1e-3, atol=1e-4)
    picked = kept.__getitems__([4, 0]).features[0]
    torch.testing.assert_close(picked, features[0][[4, 0]], rtol=1e-3, atol=1e-4)
    assert picked.is_contiguous(memory_format=torch.channels_last)


def test_an_item_is_one_of_an_images_views() -> None:
    """Image 10 i + view j."""
    kept = FeatureDataset(4, 1.0, per_image=3)
    numbers = torch.tensor([10.0 * image + view for image in range(4) for view in range(3)])
    kept.append([numbers.reshape(12, 1, 1, 1)])
    torch.testing.assert_close(torch.cat([batch[0] for batch in kept.batches(5)]).flatten(), numbers)
    drawn = torch.stack([kept.__getitems__([2, 0]).features[0].flatten() for _ in range(50)])
    assert set(drawn[:, 0].tolist()) == {20.0, 21.0, 22.0}
    assert set(drawn[:, 1].tolist()) == {0.0, 1.0, 2.0}


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of memory")
def test_the_file_does_not_count_as_memory() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    part = [torch.ones(100, 64, 32, 32)]
    for limit, grows in ((1.0, True), (0.0, False)):
        before = resident()
        kept = FeatureDataset(2000, limit)  # 250 MiB
        for _ in range(20):
            kept.append(part)
        for features in kept.batches(50):
            assert (features[0] == 1).all()
        assert (resident() - before > 150 * 2**20) == grows
        del kept


def test_too_little_space_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"cache_limit is 0.0 GiB, so .* GiB of features go to a file in .* are free"):
        FeatureDataset(1000, 0.0).append([torch.zeros(1, 8, 4, 4)])


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files is a disk of 2 MiB."""
    folder = tmp_path / "disk"
    with mounted(folder, "-t", "tmpfs", "-o", "size=2m", "tmpfs"):
        monkeypatch.setattr("tempfile.tempdir", str(folder))
        yield folder


def test_a_disk_that_is_too_small_is_named(small_disk: Path, quickstart: Quickstart, tmp_path: Path) -> None:
    model = small_dhkd(cache_limit=0.0, num_views=60)
    with pytest.raises(OSError, match=rf"features go to a file in {small_disk}, where 0.00 GiB are free"):
        fit(quickstart, tmp_path / "results", model)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_later_does_no_harm(small_disk: Path) -> None:
    features = torch.randn(64, 8, 32, 32).half().float()  # 1 MiB
    kept = FeatureDataset(64, 0.0)
    kept.append([features[:4]])
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "other").write_bytes(bytes(2**22))
    kept.append([features[4:]])
    torch.testing.assert_close(torch.cat([batch[0] for batch in kept.batches(16)]), features)


@pytest.mark.parametrize("cache_limit", [2.0, 0.0])
def test_training_on_kept_features_is_training_on_images(
    quickstart: Quickstart, tmp_path: Path, cache_limit: float
) -> None:
    """The same batches in the same order, up to half precision."""
    losses = []
    for limit in (None, cache_limit):
        torch.manual_seed(0)
        model = small_dhkd(train_steps=8, noise_std=0, cache_limit=limit, num_views=0)
        _, recorder = fit(quickstart, tmp_path, model, limit_val_batches=1)
        losses.append([step["loss"] for step in recorder.steps])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_images_are_read_once(tmp_path: Path) -> None:
    """A training goes on, and is calibrated, when its images are gone after the first step."""
    datamodule = Quickstart(root=tmp_path, num_train=8, num_test=1, train_batch_size=4, num_workers=0)

    class RemoveImages(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            shutil.rmtree(datamodule.root / "brick" / "train", ignore_errors=True)

    model = small_dhkd(train_steps=8)
    _, recorder = fit(datamodule, tmp_path / "results", model, callbacks=[RemoveImages()])
    assert recorder.phases == "ttttssss"
    assert model.finished
    assert not (datamodule.root / "brick" / "train").exists()


def test_the_data_module_has_its_images_and_workers_back(quickstart_root: Path, tmp_path: Path) -> None:
    datamodule = Quickstart(root=quickstart_root, num_train=8, num_test=2, train_batch_size=4, num_workers=1)
    seen: list[Any] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            workers = trainer.train_dataloader.num_workers
            seen.extend([type(datamodule.train_data).__name__, datamodule.num_workers, workers])

    fit(datamodule, tmp_path, small_dhkd(train_steps=2), callbacks=[Look()])
    assert seen == ["FeatureDataset", 1, 0]
    assert datamodule.train_data[0].image.shape == (3, 64, 64)
    assert datamodule.num_workers == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of mapped files")
def test_the_file_is_gone_after_training(quickstart: Quickstart, tmp_path: Path) -> None:
    class Mapped(Callback):
        during = False

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.during = _maps_a_deleted_file()

    mapped = Mapped()
    fit(quickstart, tmp_path, small_dhkd(train_steps=2, cache_limit=0.0), callbacks=[mapped])
    assert mapped.during
    assert not _maps_a_deleted_file()


def _maps_a_deleted_file() -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(tempfile.gettempdir() in line and line.endswith("(deleted)") for line in lines)


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ("augmentations", "the training images may be augmented"),
        ("collate", "the training images may be augmented"),
        ("limit", "cache_limit is None"),
        ("fast_dev_run", "fast_dev_run looks at a few of them only"),
    ],
)
def test_why_features_are_not_kept(
    why: str, reason: str, quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if why == "augmentations":
        quickstart.train_augmentations = RandomHorizontalFlip()
    if why == "collate":
        quickstart.prepare_data()
        quickstart.setup()
        quickstart.external_collate_fn = quickstart.train_data.collate_fn
    model = small_dhkd(train_steps=2, cache_limit=None if why == "limit" else 2.0)
    with caplog.at_level("INFO", logger="anomalib_dhkd"):
        fit(quickstart, tmp_path, model, limit_val_batches=1, fast_dev_run=2 if why == "fast_dev_run" else False)
    assert f"Features are extracted at every step, because {reason}." in caplog.text
    assert model.finished
