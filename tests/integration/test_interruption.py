# SPDX-License-Identifier: Apache-2.0

"""anomalib's command line, cut short and resumed, as a user would."""

import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from anomalib_dhkd import Dhkd
from tests.helpers import SMALL, anomalib

TRAIN = ["train", "--model", "anomalib_dhkd.Dhkd", *(f"--model.{key}={value}" for key, value in SMALL.items())]
LONG = ["--model.train_steps=2000"]


def _data(root: Path) -> list[str]:
    arguments = {"root": root, "num_train": 8, "num_test": 2, "train_batch_size": 2, "num_workers": 0}
    return ["--data", "Quickstart", *(f"--data.{key}={value}" for key, value in arguments.items())]


def _checkpoint(folder: Path, name: str = "model") -> Path:
    return folder / "results" / "Dhkd" / "Quickstart" / "brick" / "latest" / "weights" / "lightning" / f"{name}.ckpt"


def _until_unfinished(command: list[str], folder: Path) -> subprocess.Popen:
    """Start a training in a session of its own and wait until it has saved itself for the first time."""
    script = [str(Path(sys.executable).with_name("anomalib")), *command]
    process = subprocess.Popen(
        script,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Tests that run in the background ignore Ctrl-C, and their children would inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    while not _checkpoint(folder, "unfinished").exists():
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_interrupted_and_resumed(number: signal.Signals, quickstart_root: Path, tmp_path: Path) -> None:
    command = [*TRAIN, *LONG, *_data(quickstart_root)]
    process = _until_unfinished(command, tmp_path)
    process.send_signal(number)
    output = process.communicate()[0]
    unfinished = _checkpoint(tmp_path, "unfinished").resolve()
    assert process.returncode != 0
    assert not _checkpoint(tmp_path).exists()
    if number == signal.SIGINT:
        message = re.sub(r"\s+", "", output)
        assert "withoutafinishedmodel(KeyboardInterrupt).`--ckpt_path" in message
        assert "unfinished.ckpt`resumesitfromstep100." in message
    # The same command, resumed, with as many steps as are quick to do.
    step = torch.load(unfinished, weights_only=True)["global_step"]
    command[command.index("--model.train_steps=2000")] = f"--model.train_steps={step + 20}"
    anomalib(tmp_path, *command, "--ckpt_path", str(unfinished))
    model = Dhkd.load_from_checkpoint(_checkpoint(tmp_path))
    assert model.finished
    assert model.budget.total_steps >= step + 20
    assert model.post_processor.image_threshold.isfinite()
    assert not _checkpoint(tmp_path, "unfinished").exists()


def test_max_time(quickstart_root: Path, tmp_path: Path) -> None:
    """In the student's phase, which begins after two of its steps' time: 4 steps of 100,000 are the teacher's."""
    output = anomalib(
        tmp_path, *TRAIN, *_data(quickstart_root), "--model.flow_steps=0", "--trainer.max_time=00:00:00:05"
    )
    assert "Training was cut short after step" in output
    assert Dhkd.load_from_checkpoint(_checkpoint(tmp_path)).finished
