# SPDX-License-Identifier: Apache-2.0

"""The subcommand ``benchmark``: train, test and time models side by side and report."""

import os
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from anomalib.pipelines.components import Pipeline, Runner
from jsonargparse import ArgumentParser, Namespace

from .jobs import InferenceJobGenerator, RetestJobGenerator, TrainingJobGenerator, failed
from .runner import ProgressRunner

OPTIONS = {
    "results_dir",
    "accelerator",
    "workers",
    "scheduler",
    "reported",
    "benchmark",
    "robustness",
    "parity",
    "inference",
}


def require(extra: str, *packages: str) -> None:
    """Raise ``ModuleNotFoundError`` unless the packages of an extra of this one are installed."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        msg = f"{', '.join(missing)} must be installed for this benchmark: pip install 'anomalib-dhkd[{extra}]'."
        raise ModuleNotFoundError(msg)


class Benchmark(Pipeline):
    """Compare anomaly detection models side by side."""

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """Add the options that replace those of the configuration."""
        parser = Pipeline.get_parser(parser)
        parser.add_argument("--root", type=str, nargs="+", help="Folder of the data set, or one for each in a grid.")
        parser.add_argument("--results_dir", type=str | None, default=None, help="Folder for jobs and report.")
        parser.add_argument("--workers", type=int | None, default=None, help="Jobs at a time on this machine.")
        return parser

    def _get_args(self, args: Namespace | None) -> dict:
        settings = super()._get_args(args)
        unknown = sorted(set(settings) - OPTIONS)
        if unknown:
            msg = f"{', '.join(unknown)} in the configuration must be some of {', '.join(sorted(OPTIONS))}."
            raise ValueError(msg)
        for name in ("results_dir", "workers"):
            if args is not None and args.get(name) is not None:
                settings[name] = args[name]
        if args is not None and args.get("root") is not None:
            data = settings["benchmark"]["data"]
            entries = data.get("grid", [data])
            if len(args["root"]) != len(entries):
                msg = f"root must be {len(entries)} folder(s), one for each entry of data, got {args['root']}."
                raise ValueError(msg)
            for entry, root in zip(entries, args["root"], strict=True):
                entry.setdefault("init_args", {})["root"] = root
        accelerator = settings.setdefault("accelerator", "cpu")
        if accelerator not in {"cpu", "cuda"}:
            msg = f"accelerator must be 'cpu' or 'cuda', got {accelerator!r}."
            raise ValueError(msg)
        if accelerator == "cuda" and not settings.get("scheduler") and not torch.cuda.is_available():
            msg = "accelerator is 'cuda', but PyTorch finds no GPU on this machine; 'cpu' is allowed."
            raise ValueError(msg)
        workers = settings.setdefault("workers", torch.cuda.device_count() if accelerator == "cuda" else 1)
        if not isinstance(workers, int) or workers < 1:
            msg = f"workers must be at least 1, got {workers!r}."
            raise ValueError(msg)
        return settings

    def _setup_runners(self, args: dict) -> list[Runner]:
        """Return runners for the trainings, the changed images, the exported files and the comparison of inference."""
        results_dir = Path(args["results_dir"])
        executor: Executor
        alone: Executor
        if args.get("scheduler"):
            require("dask", "distributed")
            from distributed import Client  # noqa: PLC0415  # an optional extra

            client = Client(args["scheduler"])
            executor, workers, devices = client.get_executor(), sum(client.nthreads().values()), 0
            alone = executor
        else:
            workers = args["workers"]
            executor, alone = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)  # what is timed has the machine alone
            devices = torch.cuda.device_count() if args["accelerator"] == "cuda" else 0
        return [
            ProgressRunner(TrainingJobGenerator(results_dir, args["accelerator"]), executor, workers, devices),
            ProgressRunner(RetestJobGenerator(results_dir, "robustness"), executor, workers, devices),
            ProgressRunner(RetestJobGenerator(results_dir, "parity"), alone, 1),
            ProgressRunner(InferenceJobGenerator(results_dir), alone, 1),
        ]

    def run(self, args: Namespace | None = None) -> None:
        """Do all jobs that aren't done yet and write the report.

        Args:
            args (Namespace | None): Arguments of the command line.

        Raises:
            SystemExit: With status 1 if a job failed, after the report was written.
        """
        require("benchmark", "jinja2", "matplotlib", "tabulate")
        from .inference import InferenceSettings  # noqa: PLC0415  # takes time
        from .parity import parse_formats  # noqa: PLC0415  # takes time
        from .report import write_report  # noqa: PLC0415  # needs the extra
        from .robustness import parse_sets  # noqa: PLC0415  # takes time
        from .work import parse  # noqa: PLC0415  # takes time

        settings = self._get_args(args)
        inference_settings = settings.get("inference") or {}
        robustness_settings = settings.get("robustness") or {}
        if robustness_settings:
            parse_sets(robustness_settings)
        parity_settings = settings.get("parity") or {}
        formats = parse_formats(parity_settings) if parity_settings else []
        if "ONNX" in formats:
            require("benchmark", "onnxruntime")
        if "INT8" in InferenceSettings.parse(inference_settings).precisions or any("INT8" in name for name in formats):
            require("int8", "nncf")
        training, robustness, parity, inference = self._setup_runners(settings)
        jobs: Any = training.generator(settings["benchmark"])
        for job in jobs:
            parse(job.settings)  # a wrong argument is found now, not after hours
        try:
            trainings = training.run(settings["benchmark"])
            changed = robustness.run(robustness_settings, trainings)
            exported = parity.run(parity_settings, trainings)
            latencies = inference.run(inference_settings, trainings)
        except KeyboardInterrupt:
            print(  # noqa: T201
                f"Interrupted. The same command goes on from the jobs finished in {settings['results_dir']}.",
                flush=True,
            )
            os._exit(130)  # without waiting for the jobs that run, which end with this process
        results_dir, with_reported = Path(settings["results_dir"]), settings.get("reported", False)
        write_report(results_dir, trainings, changed, exported, latencies, reported=with_reported)
        if any(failed(row) for table in (trainings, changed, exported, latencies) for row in table.to_dict("records")):
            raise SystemExit(1)
