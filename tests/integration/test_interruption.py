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
from tests.helpers import SMALL, anomalib, assert_same

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


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGINT, id="Ctrl-C"), pytest.param(signal.SIGKILL, id="kill -9", marks=pytest.mark.slow)],
)
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


def _killed(command: list[str], folder: Path, seconds: float) -> str:
    """Start a training, kill it after some time, and return what it had logged."""
    script = [str(Path(sys.executable).with_name("anomalib")), *command]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(script, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        time.sleep(seconds)
        process.kill()
        process.wait()
    return (folder / "log.txt").read_text()


@pytest.mark.kill
def test_killed_at_twenty_moments_and_resumed(quickstart_root: Path, tmp_path: Path) -> None:
    arguments = {"root": quickstart_root, "num_train": 64, "num_test": 2, "train_batch_size": 8, "num_workers": 0}
    data = ["--data", "Quickstart", *(f"--data.{key}={value}" for key, value in arguments.items())]
    command = [*TRAIN, *data, "--model.train_steps=160", "--model.seed=0"]
    whole = tmp_path / "whole"
    whole.mkdir()
    start = time.monotonic()
    anomalib(whole, *command)
    seconds = time.monotonic() - start
    expected = Dhkd.load_from_checkpoint(_checkpoint(whole))
    moments: list[str] = []
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        # From where the imports end to where the test begins.
        log = _killed(command, folder, seconds * (0.3 + 0.6 * number / 20))
        unfinished = _checkpoint(folder, "unfinished")
        step = torch.load(unfinished, weights_only=True)["global_step"] if unfinished.exists() else 0
        if _checkpoint(folder).exists():
            moments.append("after the end")
        else:
            moments.append("calibration" if "Fitted" in log else f"step {step}" if "Extracting" in log else "start")
            resumed = ["--ckpt_path", str(unfinished.resolve())] if step else []
            anomalib(folder, *command, *resumed)
        print(f"killed at {moments[-1]}", flush=True)  # noqa: T201
        assert_same(Dhkd.load_from_checkpoint(_checkpoint(folder)), expected)
    assert len(set(moments)) > 5


@pytest.mark.slow
def test_max_time(quickstart_root: Path, tmp_path: Path) -> None:
    """In the student's phase, which begins after two of its steps' time: 4 steps of 100,000 are the teacher's."""
    output = anomalib(
        tmp_path, *TRAIN, *_data(quickstart_root), "--model.flow_steps=0", "--trainer.max_time=00:00:00:05"
    )
    assert "Training was cut short after step" in output
    assert Dhkd.load_from_checkpoint(_checkpoint(tmp_path)).finished
