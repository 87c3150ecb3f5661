# SPDX-License-Identifier: Apache-2.0

"""anomalib's tiled ensemble, within what it can do with any model."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from anomalib.pipelines.tiled_ensemble import TrainTiledEnsemble

from anomalib_dhkd import Dhkd, Quickstart


def _train(quickstart: Quickstart, folder: Path, model: dict[str, Any]) -> list[Path]:
    """Train an ensemble of two tiles, and return its checkpoints."""
    quickstart.prepare_data()
    quickstart.setup()
    parts = Path(quickstart.train_data.samples.image_path[0]).parents[2]
    folders = {"normal_dir": "train/good", "abnormal_dir": "test/stain", "mask_dir": "ground_truth/stain"}
    data = {"name": "parts", "root": str(parts), "num_workers": 0, "val_split_mode": "same_as_test", **folders}
    config = {
        "seed": 0,
        "accelerator": "cpu",
        "default_root_dir": str(folder),
        "tiling": {"tile_size": [64, 64], "stride": 64, "image_size": [64, 128]},
        "normalization_stage": "image",
        "data": {"class_path": "anomalib.data.Folder", "init_args": data},
        "SeamSmoothing": {"apply": False},
        "TrainModels": {"trainer": {"max_steps": 2, "enable_progress_bar": False}, "model": model},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    TrainTiledEnsemble().run(Namespace(config=str(file)))
    return sorted(folder.rglob("*.ckpt"))


@pytest.mark.slow
def test_tiled_ensemble(quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # anomalib writes its log there
    checkpoints = _train(quickstart, tmp_path, {"class_path": "anomalib_dhkd.Dhkd"})
    assert [path.name for path in checkpoints] == ["model0_0.ckpt", "model0_1.ckpt"]
    assert all(Dhkd.load_from_checkpoint(path).finished for path in checkpoints)
    assert list(tmp_path.rglob("stats.json"))


@pytest.mark.parametrize(
    ("path", "arguments"), [("anomalib_dhkd.Dhkd", {"width": 8}), ("anomalib.models.Padim", {"pre_trained": False})]
)
def test_arguments_of_any_model_are_anomalibs_to_lose(
    path: str, arguments: dict[str, Any], quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, docs/troubleshooting.md can do without its paragraph on it."""
    monkeypatch.chdir(tmp_path)
    assert _train(quickstart, tmp_path, {"class_path": path, "init_args": arguments}) == []
    assert "PreProcessor' is not a supported primitive type" in Path("runs/pipeline.log").read_text()
