# SPDX-License-Identifier: Apache-2.0

"""Fixtures shared by the tests."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.engine import Engine

from anomalib_dhkd import Dhkd, Quickstart

REPOSITORY = Path(__file__).parents[1]

SMALL = {
    "flow_steps": 2,
    "flow_channels": 8,
    "student_blocks": 1,
    "student_channels": 8,
    "frequency_branch": True,
    "mixture": 16,
}
"""Arguments of a network that trains in a moment; every part of it is on."""


def anomalib(folder: Path, *arguments: str) -> str:
    """Run anomalib's command line in a folder, as a user would, and return what it prints."""
    command = [str(Path(sys.executable).with_name("anomalib")), *arguments]
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    return completed.stdout + completed.stderr


def openvino_differences(path: Path, model: Dhkd, images: Iterable[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return by how much an exported model's scores, and its maps, differ from those of the model itself."""
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    scores, maps = [], []
    for image in images:
        with torch.no_grad():
            expected = model(image[None])
        outputs = compiled(image[None].numpy())
        scores.append(np.abs(outputs["pred_score"] - expected.pred_score.numpy()))
        maps.append(np.abs(outputs["anomaly_map"] - expected.anomaly_map.numpy()))
    return np.concatenate(scores), np.concatenate(maps)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quickstart_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the tests' quickstart images are written to, once."""
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture
def quickstart(quickstart_root: Path) -> Quickstart:
    """A data module with two training batches."""
    return Quickstart(root=quickstart_root, num_train=8, num_test=2, train_batch_size=4, num_workers=0)


@pytest.fixture
def held_out_quickstart(quickstart_root: Path) -> Quickstart:
    """A data module that trains on four images and validates on four others."""
    return Quickstart(
        root=quickstart_root, num_train=8, num_test=2, train_batch_size=4, num_workers=0, seed=0,
        val_split_mode="from_train", val_split_ratio=0.5,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained(quickstart_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Dhkd, Quickstart]:
    """A small model after a whole training, with its engine and data."""
    torch.manual_seed(0)
    datamodule = Quickstart(root=quickstart_root, num_train=8, num_test=2, train_batch_size=4, num_workers=0)
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("results"), enable_progress_bar=False)
    model = Dhkd(**SMALL, train_steps=20)
    engine.fit(model=model, datamodule=datamodule)
    return engine, model, datamodule
