# SPDX-License-Identifier: Apache-2.0

"""What several tests use."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_dhkd import Dhkd, Quickstart

REPOSITORY = Path(__file__).parents[1]
MVTEC_ROOT = Path(os.environ.get("MVTEC_ROOT", REPOSITORY.parent / "shared" / "data" / "mvtec_ad"))
"""Real images of MVTec AD, for tests that are skipped without them."""
PATIENCE = 600
"""Seconds after which a test takes what it waits for to hang; on a machine with other work, a process starts in 60."""

SMALL: dict[str, Any] = {
    "width": 8,
    "flow_steps": 2,
    "student_blocks": 1,
    "frequency_branch": True,
    "num_gaussians": 16,
}
"""Arguments of a network that trains in a moment; every part of it is on."""


def small_dhkd(**changes: Any) -> Dhkd:
    """Return such a network for images of 64 x 64 pixels."""
    return Dhkd(**(SMALL | {"pre_processor": Dhkd.configure_pre_processor((64, 64))} | changes))


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Assert that weights, calibration and thresholds are the same, bit for bit."""
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True, msg=name)


class Trained(NamedTuple):
    """A trained model, a new engine and a new data module."""

    engine: Engine
    model: Dhkd
    datamodule: Quickstart
    checkpoint: Path


class Recorder(Callback):
    """Records phase, losses, gradients and learning rates of each step, and the steps of validations."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.validations: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append(
            {
                "step": trainer.global_step,
                "phase": pl_module.phase,
                "teacher": _has_gradient(pl_module.model.teachers),
                "student": _has_gradient(pl_module.model.students),
                "rates": [group["lr"] for group in optimizer.param_groups],
            }
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        if self.steps:  # else the gradients of the first step are still being accumulated
            self.steps[-1]["loss"] = float(outputs["loss"])
            self.steps[-1]["logged"] = {key: float(value) for key, value in trainer.progress_bar_metrics.items()}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validations.append(trainer.global_step)

    @property
    def phases(self) -> str:
        """The first letters of the steps' phases."""
        return "".join(step["phase"][0] for step in self.steps)


def _has_gradient(module: torch.nn.Module | None) -> bool:
    return module is not None and any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())


def fit(
    datamodule: Quickstart,
    folder: Path,
    model: Dhkd,
    ckpt_path: Path | None = None,
    callbacks: Iterable[Callback] = (),
    **trainer: Any,
) -> tuple[Engine, Recorder]:
    """Train in anomalib's real engine and record the steps."""
    recorder = Recorder()
    trainer = {"enable_progress_bar": False} | trainer
    engine = Engine(default_root_dir=folder, callbacks=[recorder, *callbacks], **trainer)
    engine.fit(model=model, datamodule=datamodule, ckpt_path=ckpt_path)
    return engine, recorder


def script(name: str) -> str:
    """Return the path of a command that is installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def anomalib(folder: Path, *arguments: str) -> str:
    """Run anomalib's command line in a folder, as a user would, and return what it prints."""
    command = [script("anomalib"), *arguments]
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    return completed.stdout + completed.stderr


def job_processes(folder: Path) -> list[int]:
    """Return the process ids of the benchmark's jobs that work in a folder (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            command = path.read_bytes()
            if b"benchmark.work" in command and str(folder).encode() in command:
                found.append(int(path.parent.name))
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """Open Chromium, which logs its console and its requests; skip the test where it isn't installed."""
    from selenium import webdriver  # noqa: PLC0415

    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("Chromium and its driver are not installed (`make browser`)")
    options = webdriver.ChromeOptions()
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
    ):
        options.add_argument(f"--{argument}")
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        yield driver
    finally:
        driver.quit()


@contextmanager
def opened(page: Path) -> Iterator[Any]:
    """Open a page in Chromium, and assert that its console stays empty."""
    with browser() as driver:
        driver.get(page.as_uri())
        yield driver
        assert driver.get_log("browser") == []


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount something at an empty folder; skip the test where that can't be done."""
    folder.mkdir(exist_ok=True)
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if mount is None or unmount is None:
        pytest.skip("there is no mount")
    done = subprocess.run([mount, *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting takes root: {done.stderr}")
    try:
        yield
    finally:
        subprocess.run([unmount, "--lazy", str(folder)], check=True)


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
