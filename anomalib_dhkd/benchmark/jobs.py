# SPDX-License-Identifier: Apache-2.0

"""Jobs of the benchmark, and the runner that has them done on one machine or on many."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import Executor, Future, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pandas as pd
import yaml
from anomalib.pipelines.components import Job, JobGenerator, Runner
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class BenchmarkJob(Job):
    """One training with its test, or one comparison of inference, in a process of its own.

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
                reason = error.read_text() if error.exists() else f"The process ended with exit status {returncode}."
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
        combinations = list(get_iterator_from_grid_dict(args or {}))
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


class ProgressRunner(Runner):
    """Has jobs done by an executor and shows how many are done, running and left, with an estimate.

    anomalib's own runners know no total, give up all results of a run that is cut off, and the parallel one keeps a
    core busy with waiting.

    Args:
        generator (JobGenerator): Makes the jobs.
        executor (Executor): Does them: threads, each of which waits for a job's process, or a Dask client's executor.
        workers (int): Number of jobs that the executor does at a time.
        devices (int): Number of GPUs that local workers take turns on; 0 leaves the choice to the environment.
            Defaults to ``0``.
    """

    def __init__(self, generator: JobGenerator, executor: Executor, workers: int, devices: int = 0) -> None:
        super().__init__(generator)
        self.executor = executor
        self.workers = workers
        self.devices: SimpleQueue[int] | None = None
        if devices:
            self.devices = SimpleQueue()
            for worker in range(workers):
                self.devices.put(worker % devices)

    def _submit(self, job: BenchmarkJob) -> Future:
        if self.devices is None:
            return self.executor.submit(job.run)
        return self.executor.submit(self._run_on_free_device, job, self.devices)

    @staticmethod
    def _run_on_free_device(job: BenchmarkJob, devices: SimpleQueue[int]) -> dict[str, Any]:
        device = devices.get()
        try:
            return job.run(device)
        finally:
            devices.put(device)

    def run(self, args: dict[str, Any], prev_stage_results: Any = None) -> pd.DataFrame:
        """Have all jobs done.

        Args:
            args (dict[str, Any]): Arguments of the generator.
            prev_stage_results (Any): Results of the stage before.

        Returns:
            pd.DataFrame: One row for each job, in the order of the jobs, with ``title``, ``settings`` and ``folder``.
        """
        jobs: list[Any] = list(self.generator(args, prev_stage_results))
        futures: dict[Future, BenchmarkJob] = {self._submit(job): job for job in jobs if not job.finished}
        results = {job.folder: job.run() for job in jobs if job.finished}
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ) as progress:
            task = progress.add_task("", total=len(jobs), completed=len(results))

            def show() -> None:
                left = len(jobs) - len(results)
                running = min(self.workers, left)
                progress.update(
                    task,
                    completed=len(results),
                    description=f"{len(results)} done, {running} running, {left - running} left",
                )

            show()
            for future in as_completed(futures):
                job = futures[future]
                error = future.exception()
                results[job.folder] = future.result() if error is None else {"error": repr(error)}
                if "error" in results[job.folder]:
                    progress.console.print(f"{job.title} failed: {results[job.folder]['error']}", markup=False)
                show()
        return self.generator.job_class.collect(
            [
                {"title": job.title, "folder": str(job.folder), "settings": job.settings, **results[job.folder]}
                for job in jobs
            ]
        )
