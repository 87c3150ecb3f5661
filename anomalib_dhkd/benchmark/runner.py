# SPDX-License-Identifier: Apache-2.0

"""The runner that has the benchmark's jobs done, on one machine or on many."""

from concurrent.futures import Executor, Future, as_completed
from queue import SimpleQueue
from typing import Any

import pandas as pd
from anomalib.pipelines.components import JobGenerator, Runner
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .jobs import BenchmarkJob


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
