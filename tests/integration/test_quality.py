# SPDX-License-Identifier: Apache-2.0

"""A floor under what the default detects: a model that guesses doesn't pass."""

from pathlib import Path

from anomalib.engine import Engine

from anomalib_dhkd import Dhkd, Quickstart


def test_the_default_finds_the_quickstarts_defects(quickstart_root: Path, tmp_path: Path) -> None:
    """Sixty steps on 24 images, as a first try would be."""
    datamodule = Quickstart(root=quickstart_root, num_train=24, num_test=6, num_workers=0)
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    (result,) = engine.train(model=Dhkd(train_steps=60), datamodule=datamodule)
    assert result["image_AUROC"] >= 0.97
    assert result["pixel_AUROC"] >= 0.97
    assert result["pixel_AUPRO"] >= 0.9
    assert result["image_F1Score"] >= 0.95
    assert result["teacher_shift"] > result["student_shift"]
