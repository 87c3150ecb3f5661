# SPDX-License-Identifier: Apache-2.0

"""Fixtures shared by the tests."""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine

from anomalib_dhkd import Dhkd, Quickstart
from tests.helpers import SMALL, Trained, fit

# The tests' networks are small, and two test processes share the cores; threads that wait for each other would spin.
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)


if sys.platform == "linux":

    class SignalStack(ctypes.Structure):
        _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol() -> Iterator[None]:
        """Restore the thread's stack for signals: two OpenVINO Cores may leave a freed one, which ends the process."""
        stack, libc = SignalStack(), ctypes.CDLL(None)
        libc.sigaltstack(None, ctypes.byref(stack))
        try:
            return (yield)
        finally:
            libc.sigaltstack(ctypes.byref(stack), None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quickstart_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the tests' quickstart images are written to, once."""
    return tmp_path_factory.mktemp("quickstart")


def _quickstart(root: Path) -> Quickstart:
    return Quickstart(root=root, num_train=8, num_test=2, train_batch_size=4, num_workers=0)


@pytest.fixture
def quickstart(quickstart_root: Path) -> Quickstart:
    """A data module with two training batches."""
    return _quickstart(quickstart_root)


@pytest.fixture
def held_out_quickstart(quickstart_root: Path) -> Quickstart:
    """A data module that trains on four images and validates on four others."""
    return Quickstart(
        root=quickstart_root, num_train=8, num_test=2, train_batch_size=4, num_workers=0, seed=0,
        val_split_mode="from_train", val_split_ratio=0.5,
    )  # fmt: skip


@pytest.fixture(scope="session")
def trained_checkpoint(quickstart_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a small model after a whole training."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("results")
    engine, _ = fit(_quickstart(quickstart_root), folder, Dhkd(**SMALL, train_steps=20))
    return Path(engine.best_model_path)


@pytest.fixture
def trained(trained_checkpoint: Path, quickstart: Quickstart, tmp_path: Path) -> Trained:
    """The trained model, read anew for each test, so that no test can change another's."""
    quickstart.prepare_data()
    quickstart.setup()
    engine = Engine(default_root_dir=tmp_path / "engine", enable_progress_bar=False)
    return Trained(engine, Dhkd.load_from_checkpoint(trained_checkpoint).eval(), quickstart, trained_checkpoint)
