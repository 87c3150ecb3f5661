# SPDX-License-Identifier: Apache-2.0

"""The wheel and the sdist: what they hold, and that a wheel works away from the repository.

`make test-wheel` installs the wheel with all that it needs, and `make test-sdist` runs the tests of the sdist.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from anomalib_dhkd import __version__
from tests.helpers import REPOSITORY

pytest.importorskip("build")
IGNORED = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", "*.egg-info", "__pycache__", "build", "dist", "results", "site"
)


class Distributions(NamedTuple):
    """The files that `python -m build` makes."""

    wheel: Path
    sdist: Path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Build the sdist from a copy of the repository, and the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("distributions")
    shutil.copytree(REPOSITORY, folder / "copy", symlinks=True, ignore=IGNORED)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "copy")]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Distributions(wheel, sdist)


def _files(*folders: str) -> set[str]:
    """Return the repository's files in these folders."""
    files = [file for folder in folders for file in (REPOSITORY / folder).rglob("*") if file.is_file()]
    return {str(file.relative_to(REPOSITORY)) for file in files if "__pycache__" not in file.parts}


def test_their_metadata_are_what_an_index_takes(distributions: Distributions) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert all(f"anomalib_dhkd-{__version__}" in file.name for file in distributions)


def test_the_wheel_has_the_package_and_the_configurations(distributions: Distributions) -> None:
    with zipfile.ZipFile(distributions.wheel) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == _files("anomalib_dhkd") | {f"anomalib_dhkd/{name}" for name in _files("configs")}


def test_the_sdist_has_what_its_tests_need(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    needed = _files("anomalib_dhkd", "configs", "docs", "notebooks", "tests")
    needed |= {file.name for file in REPOSITORY.iterdir() if file.suffix in {".md", ".toml", ".txt", ".yml"}}
    assert needed | {"Makefile", "LICENSE"} <= held


@pytest.mark.slow
def test_an_installed_wheel_works_away_from_the_repository(distributions: Distributions, tmp_path: Path) -> None:
    """Other packages are this environment's; of the repository and of what is installed here in its place, nothing."""
    environment = tmp_path / "environment"
    venv.create(environment)
    python, dhkd = environment / "bin" / "python", environment / "bin" / "dhkd"
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        completed = subprocess.run(
            [str(word) for word in command], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
        return completed.stdout

    install = ["install", "--quiet", "--no-deps", "--no-index", distributions.wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    where = run(python, "-c", "import anomalib_dhkd; print(anomalib_dhkd.__file__)").splitlines()[-1]
    assert Path(where) == packages / "anomalib_dhkd" / "__init__.py"
    assert run(dhkd, "--help").startswith("usage: dhkd ")
    assert run(dhkd, "config", "quickstart") == (REPOSITORY / "configs" / "model" / "quickstart.yaml").read_text()
