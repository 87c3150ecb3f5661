# SPDX-License-Identifier: Apache-2.0

"""anomalib's command line with the plugin imported: ``python -m anomalib_dhkd <subcommand>``.

The package is imported before this module runs, so the short names (``--model Dhkd``, ``--data Quickstart``) resolve.
``benchmark`` is the plugin's own, which goes further than anomalib's, and so are ``watch`` and ``explain``.
"""

from typing import Any

from anomalib.cli.cli import AnomalibCLI
from anomalib.cli.pipelines import PIPELINE_REGISTRY
from anomalib.loggers import configure_logger
from jsonargparse import ArgumentParser

from anomalib_dhkd.benchmark.pipeline import Benchmark
from anomalib_dhkd.explain import explain
from anomalib_dhkd.watch import watch


class DhkdCLI(AnomalibCLI):
    """anomalib's command line, ``watch`` and ``explain``."""

    @staticmethod
    def anomalib_subcommands() -> dict[str, dict[str, str]]:
        """Return the subcommands that aren't Lightning's, with their descriptions."""
        return AnomalibCLI.anomalib_subcommands() | {
            "watch": {"description": "Run an exported model on the images of a folder, a camera or a video."},
            "explain": {"description": "Show what the parts of a trained model make of an image."},
        }

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


if __name__ == "__main__":
    if PIPELINE_REGISTRY is not None:
        PIPELINE_REGISTRY["benchmark"] = Benchmark
    configure_logger()
    DhkdCLI()
