# SPDX-License-Identifier: Apache-2.0
# PYTHON_ARGCOMPLETE_OK

"""anomalib's command line with the plugin imported: ``dhkd <subcommand>`` or ``python -m anomalib_dhkd <subcommand>``.

The package is imported before this module runs, so the short names (``--model Dhkd``, ``--data Quickstart``) resolve.
``benchmark`` is the plugin's own, which goes further than anomalib's, and so are ``watch``, ``explain`` and
``config``.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Any

from anomalib.cli.cli import AnomalibCLI
from anomalib.cli.pipelines import PIPELINE_REGISTRY
from jsonargparse import ActionConfigFile, ArgumentParser
from rich.logging import RichHandler

from anomalib_dhkd.benchmark.pipeline import Benchmark
from anomalib_dhkd.configurations import configurations, print_configuration
from anomalib_dhkd.explain import explain
from anomalib_dhkd.watch import watch


class DhkdCLI(AnomalibCLI):
    """anomalib's command line, ``watch``, ``explain`` and ``config``."""

    @staticmethod
    def anomalib_subcommands() -> dict[str, dict[str, str]]:
        """Return the subcommands that aren't Lightning's, with their descriptions."""
        return AnomalibCLI.anomalib_subcommands() | {
            "watch": {"description": "Run an exported model on the images of a folder, a camera or a video."},
            "explain": {"description": "Show what the parts of a trained model make of an image."},
            "config": {"description": "Print a configuration that comes with the package, or the names of all."},
        }

    def add_subcommands(self, **kwargs: Any) -> None:
        """Add the subcommands to a parser whose help names the command as it was typed."""
        command = Path(sys.argv[0]).name
        self.parser = ArgumentParser(prog="python -m anomalib_dhkd" if command == "__main__.py" else command)
        # Under its own name, the option would take the place of the subcommand `config`.
        self.parser.add_argument(
            "-c", "--config", dest="config_file", action=ActionConfigFile, help="Path to a file with all of these."
        )
        super().add_subcommands(**kwargs)
        self._complete()

    def _complete(self) -> None:
        """Let argcomplete complete what follows a subcommand; jsonargparse does so for the subcommand itself alone."""
        start = int(os.environ.get("_ARGCOMPLETE", "0"))  # how many words name the command
        words = os.environ.get("COMP_LINE", "").split(" ")[:-1]
        if start and len(words) > start and words[start] in self.subcommand_parsers:
            os.environ["_ARGCOMPLETE"] = str(start + 1)
            self.subcommand_parsers[words[start]].parse_args()

    def add_watch_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments of ``watch`` to its parser."""
        self.subcommand_method_arguments["watch"] = parser.add_function_arguments(watch)

    def add_explain_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments of ``explain`` to its parser."""
        self.subcommand_method_arguments["explain"] = parser.add_function_arguments(explain)

    def watch(self) -> None:
        """Run the subcommand ``watch``."""
        watch(**self._arguments("watch"))

    def explain(self) -> None:
        """Run the subcommand ``explain``."""
        explain(**self._arguments("explain"))

    def _arguments(self, subcommand: str) -> dict[str, Any]:
        return {name: self.config_init[subcommand][name] for name in self.subcommand_method_arguments[subcommand]}

    def add_config_arguments(self, parser: ArgumentParser) -> None:
        """Add the argument of ``config`` to its parser."""
        names = list(configurations())
        parser.add_argument("name", nargs="?", choices=names, metavar="name", help="Its name; without, all are listed.")

    def before_instantiate_classes(self) -> None:
        """Print a configuration and end, or prepare what the other subcommands need."""
        if self.subcommand == "config":
            print_configuration(self.config["config"]["name"])
            sys.exit()
        super().before_instantiate_classes()


def main() -> None:
    """Run the command line."""
    if PIPELINE_REGISTRY is not None:
        PIPELINE_REGISTRY["benchmark"] = Benchmark
    # anomalib's configure_logger adds this handler beside a plain one, and each line is written twice.
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(rich_tracebacks=True)])
    logging.getLogger("anomalib.cli.pipelines").setLevel(logging.ERROR)  # warns that anomalib's benchmark may go
    DhkdCLI()


if __name__ == "__main__":
    main()
