# SPDX-License-Identifier: Apache-2.0

"""The subcommand ``config``: configurations that come with the package, by their names."""

from pathlib import Path


def configurations() -> dict[str, Path]:
    """Return the files by their names, those for ``train`` first.

    Returns:
        dict[str, Path]: Files for ``train`` by their stems, such as ``quickstart``, and files for ``benchmark`` with
            that word ahead, such as ``benchmark/quickstart``.
    """
    folder = Path(__file__).parent / "configs"
    models = {file.stem: file for file in sorted((folder / "model").glob("*.yaml"))}
    benchmarks = {f"benchmark/{file.stem}": file for file in sorted((folder / "benchmark").glob("*.yaml"))}
    return models | benchmarks


def print_configuration(name: str | None) -> None:
    """Print a configuration as it is in its file, or the names of all of them with the first line of each.

    Args:
        name (str | None): Name of a configuration; ``None`` for all names.
    """
    files = configurations()
    if name is None:
        width = max(map(len, files))
        print(*(f"{key:{width}}  {file.open().readline()[2:].strip()}" for key, file in files.items()), sep="\n")  # noqa: T201
    else:
        print(files[name].read_text(), end="")  # noqa: T201
