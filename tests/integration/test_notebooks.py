# SPDX-License-Identifier: Apache-2.0

"""The notebooks: each runs from top to bottom, and what is committed of its outputs is small and clean."""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.helpers import PATIENCE, REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
LARGEST = 300_000
"""Bytes of a notebook with its outputs."""
LONG = {"03_deploy", "05_compare"}
"""Notebooks of some minutes, whose parts have tests of their own."""
ABSOLUTE_PATH = re.compile(r"(?<![\w.<:/~-])/[A-Za-z][\w.-]*/\S*")
WITH_EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook: NotebookNode, kind: str) -> list[NotebookNode]:
    """Return the cells of a kind."""
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def pictures(notebook: NotebookNode) -> int:
    """Return the number of pictures in the outputs."""
    return sum("image/jpeg" in output.get("data", {}) for cell in cells(notebook, "code") for output in cell.outputs)


def printed(notebook: NotebookNode) -> Iterator[str]:
    """Yield all outputs that are text, HTML included."""
    for cell in cells(notebook, "code"):
        for output in cell.outputs:
            yield output.get("text", "")
            yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text/"))


def test_there_are_notebooks() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.no_cover  # the kernel is a process of its own
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else []) for path in NOTEBOOKS],
)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    expected = pictures(notebook)
    for cell in cells(notebook, "code"):
        cell.outputs = []
    NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) == expected


@WITH_EACH
def test_committed_outputs_are_those_of_one_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = cells(notebook, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) >= 2
    # Nothing but what cells print and show: no errors, no warnings, no progress bars.
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} <= {"stdout"}


@WITH_EACH
def test_committed_notebook_is_small_and_tells_nothing_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < LARGEST
    assert [found for text in printed(notebook) for found in ABSOLUTE_PATH.findall(text)] == []
    assert set(notebook.metadata) == {"kernelspec"}
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []


def test_absolute_paths_are_found() -> None:
    text = "a/b results/c.png </td></tr> 1/2 https://x/y ../docs/x.md, but '/home/name/x' and\n/tmp/a.png and >/opt/b<"
    assert ABSOLUTE_PATH.findall(text) == ["/home/name/x'", "/tmp/a.png", "/opt/b<"]  # noqa: S108


@WITH_EACH
def test_links_lead_to_files(path: Path) -> None:
    texts = [cell.source for cell in cells(nbformat.read(path, as_version=4), "markdown")]
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(texts))
    assert len(links) >= 2
    assert [link for link in links if not (path.parent / link).is_file()] == []
    assert "## What next" in texts[-1]
