# SPDX-License-Identifier: Apache-2.0

"""The package uses what other libraries make public, but for what is listed here."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import anomalib_dhkd

PACKAGE = Path(anomalib_dhkd.__file__).parent
OVERRIDDEN = {
    ("RankPreservingPostProcessor", "_normalize"),  # anomalib has no public way to replace the mapping alone
    ("Benchmark", "_get_args"),  # of anomalib's pipelines, whose subclasses are meant to define these
    ("Benchmark", "_setup_runners"),
}
"""Methods of ours that replace private ones of anomalib."""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _own_names(tree: ast.Module) -> set[str]:
    """Return the private names that a file defines itself: functions, classes, variables and attributes of self."""
    names = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def reaches(file: Path) -> set[tuple[str, str]]:
    """Return private names that a file touches and that aren't its own."""
    tree = ast.parse(file.read_text())
    own = _own_names(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            mine = node.attr in own and ast.unparse(node.value) in {"self", "cls", "super()", *own}
            # What a named tuple and the operating system offer for use has an underscore, too.
            if not mine and node.attr not in {"_asdict", "_replace", "_exit"}:
                found.add((str(file.relative_to(PACKAGE)), node.attr))
        modules = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        parts = [part for module in modules for part in module.split(".")]
        found |= {(str(file.relative_to(PACKAGE)), part) for part in parts if _is_private(part)}
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"getattr", "setattr", "hasattr", "delattr"}:
            name = node.args[1]
            if isinstance(name, ast.Constant) and _is_private(str(name.value)) and name.value not in own:
                found.add((str(file.relative_to(PACKAGE)), str(name.value)))
    return found


def test_no_private_name_of_another_library_is_touched() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    assert set().union(*map(reaches, files)) == set()


def test_the_search_finds_reaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    file = tmp_path / "reach.py"
    file.write_text(
        "import torch._C\nfrom timm._x import y\n"
        "def f(trainer):\n    trainer._a = getattr(trainer, '_b')\n    return trainer.loop._c\n"
        "class D:\n    def __init__(self): self._mine = 1\n    def g(self): return self._mine, self._theirs\n"
    )
    assert {name for _, name in reaches(file)} == {"_C", "_x", "_a", "_b", "_c", "_theirs"}


def test_private_methods_of_others_are_replaced_only_where_listed() -> None:
    found = set()
    for module in pkgutil.walk_packages([str(PACKAGE)], "anomalib_dhkd."):
        if module.name.endswith("__main__"):
            continue
        for _, one in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if one.__module__ == module.name:
                others = [base for base in one.__mro__ if not base.__module__.startswith("anomalib_dhkd")]
                found |= {
                    (one.__name__, name)
                    for name in vars(one)
                    if _is_private(name) and name != "_abc_impl" and any(name in vars(base) for base in others)
                }
    assert found == OVERRIDDEN


def test_files_are_short() -> None:
    lengths = {file.name: len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 300} == {}
