# SPDX-License-Identifier: Apache-2.0

"""The command ``dhkd`` as a shell runs it: usage, completion, configurations by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import REPOSITORY, SMALL, script

DHKD = [script("dhkd")]
MODULE = [sys.executable, "-m", "anomalib_dhkd"]


@pytest.mark.parametrize(
    ("command", "usage"),
    [([*DHKD, "benchmark"], "usage: dhkd [options] benchmark "), (MODULE, "usage: python -m anomalib_dhkd ")],
)
def test_usage_names_what_was_typed(command: list[str], usage: str) -> None:
    completed = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert completed.stdout.startswith(usage)


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("dhkd wa", {"watch"}),
        ("dhkd config benchmark/g", {"benchmark/growth"}),
        ("python -m anomalib_dhkd train --trainer.max_e", {"--trainer.max_epochs"}),
    ],
)
def test_completion(typed: str, completions: set[str], tmp_path: Path) -> None:
    """As argcomplete's shell function asks for it."""
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    module = typed.startswith("python")
    environment = os.environ | {
        "_ARGCOMPLETE": "3" if module else "1",  # how many words name the command
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": typed,
        "COMP_POINT": str(len(typed)),
        "COMP_TYPE": "9",
    }
    completed = subprocess.run(MODULE if module else DHKD, env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert {word.strip() for word in answer.read_text().split("\013")} == completions


def test_a_configuration_trains_without_a_file_of_it() -> None:
    """Bash hands over what ``config`` prints."""
    line = '"$0" train --config <("$0" config quickstart) --print_config'
    completed = subprocess.run(["/bin/bash", "-c", line, *DHKD], capture_output=True, text=True, check=True)
    config = yaml.safe_load(completed.stdout)
    written = yaml.safe_load((REPOSITORY / "configs" / "model" / "quickstart.yaml").read_text())
    assert config["data"]["class_path"] == written["data"]["class_path"]
    assert config["data"]["init_args"].items() >= written["data"]["init_args"].items()
    assert config["model"]["init_args"].items() >= written["model"]["init_args"].items()


def test_a_training_shows_each_line_once_and_no_warnings_of_other_packages(
    quickstart_root: Path, tmp_path: Path
) -> None:
    model = ["--model", "Dhkd", *(f"--model.{key}={value}" for key, value in SMALL.items()), "--model.train_steps=2"]
    data = ["--data", "Quickstart", "--data.root", str(quickstart_root), "--data.num_train=8", "--data.num_test=2"]
    command = [*DHKD, "train", *model, *data, "--data.num_workers=0"]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    output = completed.stdout + completed.stderr
    assert completed.returncode == 0, output[-3000:]
    assert "Next:" in output
    for words in ("Initializing Dhkd model.", "DHKD trains for", "Training took"):
        assert output.count(words) == 1
    for words in ("Warning", "treespec", "module(s) in eval mode", "`max_epochs` was not set"):
        assert words not in output
