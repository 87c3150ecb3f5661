# SPDX-License-Identifier: Apache-2.0

"""Compiled files in the benchmark's process."""

import subprocess
import sys
from pathlib import Path

import openvino as ov
import torch

SIGNAL_AFTER_TWO_MODELS = """
import signal, subprocess, sys
from pathlib import Path
from anomalib_dhkd.benchmark.inference import compile_file
models = [compile_file(Path(sys.argv[1]), "f32", 32, {}) for _ in range(2)]
while models:
    models.pop(0)
signal.signal(signal.SIGCHLD, lambda *_: print("delivered"))  # as a data loader with workers does
subprocess.run(["true"])
"""


def test_a_signal_is_delivered_after_models_have_gone(tmp_path: Path) -> None:
    model = ov.convert_model(torch.nn.ReLU(), example_input=torch.zeros(1, 3, 32, 32))
    ov.save_model(model, tmp_path / "model.xml")
    command = [sys.executable, "-c", SIGNAL_AFTER_TWO_MODELS, str(tmp_path / "model.xml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "delivered\n"), done.stderr
