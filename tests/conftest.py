# SPDX-License-Identifier: Apache-2.0

"""Fixtures shared by the tests."""

from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine

from anomalib_dhkd import Dhkd, Quickstart

REPOSITORY = Path(__file__).parents[1]

SMALL = {"flow_steps": 2, "flow_channels": 8, "student_blocks": 1, "student_channels": 8}
"""Arguments of a network that trains in a moment; everything is switched on."""


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


@pytest.fixture(scope="session")
def trained(quickstart_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Dhkd, Quickstart]:
    """A small model after a whole training, with its engine and data."""
    torch.manual_seed(0)
    datamodule = Quickstart(root=quickstart_root, num_train=8, num_test=2, train_batch_size=4, num_workers=0)
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("results"), enable_progress_bar=False)
    model = Dhkd(**SMALL, train_steps=20)
    engine.fit(model=model, datamodule=datamodule)
    return engine, model, datamodule
