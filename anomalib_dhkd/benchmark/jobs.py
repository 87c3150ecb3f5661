# SPDX-License-Identifier: Apache-2.0

"""Jobs of the benchmark."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pandas as pd
import yaml
from anomalib.pipelines.components import Job, JobGenerator
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict


class BenchmarkJob(Job):
    """A training with its test, a test on changed images or of exported files, or the comparison of inference.

    It has a process of its own.

    The folder is named after a hash of the settings: the same settings find their finished result again, changed ones
    don't.

    Args:
        name (str): What is done, for folder and display.
        settings (dict[str, Any]): Plain data, see :mod:`anomalib_dhkd.benchmark.work`.
        results_dir (Path): Folder that the job's folder goes into.
    """

    name = "benchmark"

    def __init__(self, name: str, settings: dict[str, Any], results_dir: Path) -> None:
        self.title = name
        self.settings = settings
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        slug = "".join(character if character.isalnum() else "_" for character in name)
        self.folder = (results_dir / "jobs" / f"{slug}-{digest[:8]}").resolve()

    @property
    def finished(self) -> bool:
        """Whether the result is there."""
        return (self.folder / "result.json").exists()

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Do the job, unless it was done before.

        Args:
            task_id (int | None): Index of the GPU to use. Defaults to the one that is visible first.

        Returns:
            dict[str, Any]: The result, or ``error`` with what went wrong.
        """
        if not self.finished:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "error.txt").unlink(missing_ok=True)
            (self.folder / "job.yaml").write_text(yaml.safe_dump(self.settings, sort_keys=False))
            device = {} if task_id is None else {"CUDA_VISIBLE_DEVICES": str(task_id)}
            command = [sys.executable, "-m", "anomalib_dhkd.benchmark.work", str(self.folder)]
            with (self.folder / "log.txt").open("w") as log:
                # A session of its own: Ctrl-C reaches the benchmark alone. The pipe tells the process when we die.
                process = subprocess.Popen(  # noqa: S603
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | device,
                    start_new_session=True,
                )
                returncode = process.wait()
            if not self.finished:
                error = self.folder / "error.txt"
                reason = error.read_text() if error.exists() else str(CalledProcessError(returncode, command))
                if returncode == -9:  # SIGKILL, a name that Windows doesn't have
                    reason += " That is how Linux ends what takes more memory than there is."
                return {"error": f"{reason} See {self.folder / 'log.txt'}"}
        return json.loads((self.folder / "result.json").read_text())

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> pd.DataFrame:
        """Return a table with a row for each job."""
        return pd.DataFrame(results)

    @staticmethod
    def save(results: pd.DataFrame) -> None:
        """Do nothing: each job has saved its own result, and the report is written from all stages together."""


class TrainingJobGenerator(JobGenerator):
    """Makes a job for each combination of model, data and seed in the configuration's grid.

    Args:
        results_dir (Path): Folder for the jobs.
        accelerator (str): ``"cpu"`` or ``"cuda"``.
    """

    job_class = BenchmarkJob

    def __init__(self, results_dir: Path, accelerator: str) -> None:
        self.results_dir = results_dir
        self.accelerator = accelerator

    def generate_jobs(self, args: dict | None = None, prev_stage_result: Any = None) -> Generator[Any, None, None]:
        """Yield the jobs, all models of one data set after the other.

        A model's entry has ``class_path``, ``init_args`` and, all optional, ``name``, and for this model alone
        ``image_size``, ``trainer`` (arguments of the engine) and ``data`` (arguments of the data module).

        Args:
            args (dict | None): Section ``benchmark`` of the configuration.
            prev_stage_result (Any): Unused.

        Yields:
            BenchmarkJob: Jobs, not begun.

        Raises:
            ValueError: If the section or a model's entry has another key.
        """
        del prev_stage_result  # Unused argument.
        combinations = [
            combination | {"data": data}
            for combination in get_iterator_from_grid_dict(args or {})
            for data in get_iterator_from_grid_dict(combination["data"])  # each of several may have a grid of its own
        ]
        sizes, counts = (
            len({combination.get(key) for combination in combinations}) > 1 for key in ("image_size", "train_images")
        )
        trainings = []
        for combination in combinations:
            _check_keys("benchmark", combination, {"model", "data", "seed", "image_size", "train_images", "trainer"})
            model, data = combination["model"], combination["data"]
            _check_keys("model", model, {"name", "class_path", "init_args", "image_size", "trainer", "data"})
            name = model.get("name", model["class_path"].split(".")[-1])
            image_size, train_images = combination.get("image_size"), combination.get("train_images")
            trainings.append(
                {
                    "name": name + f", {image_size} px" * sizes + f", {train_images} images" * counts,
                    "model": {"name": name} | {key: model[key] for key in ("class_path", "init_args") if key in model},
                    "data": {**data, "init_args": data.get("init_args", {}) | model.get("data", {})},
                    "seed": combination.get("seed", 0),
                    "image_size": model.get("image_size", image_size),
                    "train_images": train_images,
                    "accelerator": self.accelerator,
                    "trainer": combination.get("trainer", {}) | model.get("trainer", {}),
                }
            )
        for settings in sorted(trainings, key=lambda settings: (settings["seed"], json.dumps(settings["data"]))):
            yield BenchmarkJob(
                f"{settings['name']} {data_name(settings)} {settings['seed']}", settings, self.results_dir
            )


def _check_keys(section: str, given: dict[str, Any], allowed: set[str]) -> None:
    if not set(given) <= allowed:
        msg = f"{section} must have some of {sorted(allowed)} only, got {sorted(given)}."
        raise ValueError(msg)


def failed(row: dict[str, Any]) -> bool:
    """Return whether a row of the trainings holds an error instead of a result."""
    return isinstance(row.get("error"), str)  # not a number in a table where only others failed


def data_name(settings: dict[str, Any]) -> str:
    """Return the name of a job's data in the report: the category, or the data module where there are none."""
    arguments = settings["data"].get("init_args", {})
    return str(arguments.get("category") or arguments.get("name") or settings["data"]["class_path"].split(".")[-1])


class InferenceJobGenerator(JobGenerator):
    """Makes one job that compares the inference of the models of the first data set and seed.

    Args:
        results_dir (Path): Folder for the job.
    """

    job_class = BenchmarkJob

    def __init__(self, results_dir: Path) -> None:
        self.results_dir = results_dir

    def generate_jobs(self, args: dict | None = None, prev_stage_result: Any = None) -> Generator[Any, None, None]:
        """Yield the job, if the comparison is asked for and there is a trained model.

        Args:
            args (dict | None): Section ``inference`` of the configuration.
            prev_stage_result (Any): Table of the trainings.

        Yields:
            BenchmarkJob: The job, not begun.
        """
        models: dict[str, str] = {}
        for row in prev_stage_result.to_dict("records"):
            if not failed(row):
                models.setdefault(row["settings"]["name"], row["folder"])
        if args and models:
            yield BenchmarkJob("inference", {"models": models, "inference": args}, self.results_dir)


class RetestJobGenerator(JobGenerator):
    """Makes a job for each trained model that tests it again, on changed images or as exported files.

    Args:
        results_dir (Path): Folder for the jobs.
        section (str): Section of the configuration that says how, ``"robustness"`` or ``"parity"``.
    """

    job_class = BenchmarkJob

    def __init__(self, results_dir: Path, section: str) -> None:
        self.results_dir = results_dir
        self.section = section

    def generate_jobs(self, args: dict | None = None, prev_stage_result: Any = None) -> Generator[Any, None, None]:
        """Yield the jobs, if they are asked for.

        Args:
            args (dict | None): The section.
            prev_stage_result (Any): Table of the trainings.

        Yields:
            BenchmarkJob: Jobs, not begun.
        """
        for row in prev_stage_result.to_dict("records") if args else []:
            if not failed(row):
                settings = {"trained": row["folder"], self.section: args}
                yield BenchmarkJob(f"{row['title']} {self.section}", settings, self.results_dir)
