# SPDX-License-Identifier: Apache-2.0

"""Each command of README, CONTRIBUTING, docs and configurations, read by what it would run.

Options, files of the repository, extras and targets must be there; trainings aren't run. docs/log is left out, whose
commands are those of earlier revisions. `make test-commands` runs the pages' shell blocks as they stand, but for those
that are targets or hours long themselves: `make`, `pip` and the benchmarks on MVTec AD.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.cli.pipelines import PIPELINE_REGISTRY
from jsonargparse import ArgumentParser
from packaging.requirements import Requirement

from anomalib_dhkd import Quickstart
from anomalib_dhkd.__main__ import DhkdCLI
from anomalib_dhkd.benchmark.pipeline import Benchmark
from anomalib_dhkd.benchmark.throughput import compare
from tests.helpers import MVTEC_ROOT, PATIENCE, REPOSITORY, script

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CONFIGS = sorted((REPOSITORY / "configs").glob("*/*.yaml"))
EXTRAS = set(metadata("anomalib-dhkd").get_all("Provides-Extra") or [])
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
SHELL_BLOCK = re.compile(r"^ *```bash\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
ENVIRONMENT = {"PATH": f"{Path(script('dhkd')).parent}:{os.environ['PATH']}"}
"""What the shell needs to find the commands."""


def _blocks(file: Path) -> list[str]:
    """Return the shell blocks of a page and its commands within sentences, or the comments of a configuration."""
    text = file.read_text()
    if file.suffix == ".md":
        blocks = SHELL_BLOCK.findall(text)
        whole = re.findall(r"`((?:anomalib|dhkd|python -m anomalib_dhkd)\s\w+\s--[^`<]+|make [a-z-]+)`", text)
        return blocks + [" ".join(command.split()) for command in whole]
    return re.findall(r"(?:^#   .*\n)+", text, re.MULTILINE)


def _commands(block: str) -> list[str]:
    """Return the commands of a block, each in one line."""
    joined = re.sub(r"\\\n(?:#? *)", "", block)
    return [line.removeprefix("#").strip() for line in joined.splitlines()]


BLOCKS = [(file, block) for file in [*PAGES, *CONFIGS] for block in _blocks(file)]


def _dhkd(arguments: list[str]) -> None:
    if arguments[0] == "config":
        with pytest.raises(SystemExit) as ended:
            DhkdCLI(arguments)
        assert not ended.value.code
        return
    cli = DhkdCLI(arguments, run=False)
    if cli.subcommand == "benchmark":
        settings = cli.config["benchmark"]
        with_gpu = yaml.safe_load(Path(settings.config).read_text()).get("accelerator") == "cuda"
        if torch.cuda.is_available() or not with_gpu:
            Benchmark()._get_args(settings)


def _throughput(arguments: list[str]) -> None:
    parser = ArgumentParser()
    parser.add_function_arguments(compare)
    parser.parse_args(arguments)


def _make(arguments: list[str]) -> None:
    unknown = {word for word in arguments if "=" not in word} - TARGETS
    assert not unknown, f"{unknown} isn't in the Makefile"


def _pip(arguments: list[str]) -> None:
    wanted = Requirement(re.sub(r"^\.", "anomalib-dhkd", arguments[1]))
    assert (arguments[0], wanted.name) == ("install", "anomalib-dhkd")
    assert wanted.extras <= EXTRAS, f"{wanted.extras - EXTRAS} isn't an extra"


def _eval(arguments: list[str]) -> None:
    """Run the line that switches completion on, and see that it is on."""
    lines = f'set -o pipefail; eval "{arguments[0]}"; complete -p dhkd'
    completed = subprocess.run(
        ["/bin/bash", "-c", lines], env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr


READERS: dict[str, Callable[[list[str]], Any]] = {
    "anomalib": lambda arguments: AnomalibCLI(arguments, run=False),
    "dhkd": _dhkd,
    "python -m anomalib_dhkd": _dhkd,
    "python -m anomalib_dhkd.benchmark.throughput": _throughput,
    "make": _make,
    "pip": _pip,
    "eval": _eval,
}
"""What reads the arguments of each program as the program does."""


def _read(command: str) -> None:
    """Read a command; raise an error, or exit with a status, if its program would refuse it."""
    words = shlex.split(re.sub(r"<[^<>]+>", "data", command), comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]  # an environment variable
    length = 3 if words[0] == "python" else 1
    program, arguments = " ".join(words[:length]), words[length:]
    assert program in READERS, f"No test reads {program}."
    with contextlib.ExitStack() as stack:
        if ">" in arguments:
            *arguments, _, name = arguments
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(name).open("w"))))
        READERS[program](arguments)


@pytest.fixture(autouse=True)
def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a folder that has what the commands take for granted: the configurations, and some folders and files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PIPELINE_REGISTRY, "benchmark", Benchmark)
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "data" / "parts").mkdir(parents=True)


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=f"{file.stem}-{number}") for number, (file, block) in enumerate(BLOCKS)]
)
def test_commands_are_read(block: str) -> None:
    commands = _commands(block)
    assert commands
    for command in commands:
        _read(command)


def test_the_commands_that_must_be_there_are() -> None:
    commands = {command for _, block in BLOCKS for command in _commands(block)}
    assert "anomalib train --model anomalib_dhkd.Dhkd --data MVTec --data.category bottle" in commands
    assert {file for file, _ in BLOCKS} >= {*CONFIGS, REPOSITORY / "README.md", REPOSITORY / "docs" / "deploy.md"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("anomalib train --model anomalib_dhkd.Dhkd --data MVTec --data.categry bottle", "categry"),
        ("anomalib train --config configs/model/nothing.yaml", "does not exist"),
        ("dhkd config nothing > my.yaml", "invalid choice: 'nothing'"),
        ("dhkd watch --model model.xml --source folder --outputs verdicts.jsonl", "--outputs"),
        ("python -m anomalib_dhkd benchmark --config configs/benchmark/growth.yaml --root one two", "root must be 1"),
        ("python -m anomalib_dhkd.benchmark.throughput --model model.xml --folder folder", "--folder"),
        ("make nothing", "isn't in the Makefile"),
        ("pip install '.[nothing]'", "isn't an extra"),
        ('eval "$(register-nothing dhkd)"', "register-nothing"),
        ("docker run anomalib", "No test reads docker"),
    ],
)
def test_a_wrong_command_is_found(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((Exception, SystemExit)) as error:  # of many kinds, with a message each
        _read(command)
    assert message in f"{error.value}{capsys.readouterr().err}"


IMAGES = 8
"""Test images that ``watch`` gets."""
PLACES = {
    "README.md": {},
    "docs/deploy.md": {"/data": "data", "folder/with/images": "images", "--model weights": "--model exported/weights"},
    "docs/robustness.md": {},
    "docs/first-steps.md": {"<folder of images>": "images"},
    "docs/your-images.md": {"<folder>": "own"},
    "docs/scores.md": {"<folder>": "own/parts", "<name>": "good"},
}
"""Pages in the order in which they can be followed, with the folders that stand for what a page leaves open."""


@pytest.fixture
def _images(tmp_path: Path) -> None:
    """Put images where the pages say: MVTec AD, parts of one's own, a camera's folder, something to predict."""
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "MVTecAD").symlink_to(MVTEC_ROOT.resolve())
    root = tmp_path / "made"
    Quickstart(root=root, num_train=130, num_test=IMAGES).prepare_data()
    brick = next(root.rglob("train")).parent
    for name, target in {
        "own/parts/good": "train/good",
        "own/parts/defect": "test/dent",
        "images": "test/dent",
        "data/camera1": "test/dent",
        "path/to/image_or_folder": "test/dent",
    }.items():
        shutil.copytree(brick / target, tmp_path / name)


def _run(block: str, folder: Path) -> None:
    """Run a block in bash; end what watches a folder with Ctrl-C as soon as each image has its line."""
    environment = os.environ | ENVIRONMENT
    environment.pop("OMP_NUM_THREADS", None)
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            ["/bin/bash", "-e", "-c", block],
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        watched = re.search(r"--output (\S+)", block)
        if watched:
            verdicts, until = folder / watched[1], time.monotonic() + PATIENCE
            while process.poll() is None and time.monotonic() < until:
                time.sleep(1)
                if verdicts.is_file() and len(verdicts.read_text().splitlines()) == IMAGES:
                    break
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
        status = process.wait()
        output.seek(0)
        assert status == 0, f"{block}\n{output.read()[-3000:]}"
    if watched:
        assert len((folder / watched[1]).read_text().splitlines()) == IMAGES


@pytest.mark.commands
@pytest.mark.skipif(not MVTEC_ROOT.is_dir(), reason=f"no MVTec AD images at {MVTEC_ROOT}; set MVTEC_ROOT")
@pytest.mark.usefixtures("_images")
def test_blocks_run(tmp_path: Path) -> None:
    elsewhere = re.compile(r"(OMP_NUM_THREADS=1 )?(make|pip|python -m anomalib_dhkd benchmark) ")
    for page, places in PLACES.items():
        for block in SHELL_BLOCK.findall((REPOSITORY / page).read_text()):
            lines = "\n".join(command for command in _commands(block) if not elsewhere.match(command))
            for place, folder in places.items():
                lines = lines.replace(place, folder)
            if lines:
                start = time.monotonic()
                _run(lines, tmp_path)
                print(f"{page}, {(time.monotonic() - start) / 60:.1f} min: {lines}")  # noqa: T201
