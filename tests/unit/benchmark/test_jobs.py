# SPDX-License-Identifier: Apache-2.0

"""What a job says when its process is ended from outside."""

import os
import signal
import threading
import time
from pathlib import Path

from anomalib_dhkd.benchmark.jobs import BenchmarkJob
from tests.helpers import PATIENCE, job_processes


def _kill_when_there(folder: Path) -> None:
    """Kill the job's process as soon as it runs."""
    deadline = time.monotonic() + PATIENCE
    while not (found := job_processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for number in found:
        os.kill(number, signal.SIGKILL)


def test_a_killed_job_names_the_signal_and_what_it_means(tmp_path: Path) -> None:
    job = BenchmarkJob("killed", {}, tmp_path)
    killer = threading.Thread(target=_kill_when_there, args=(job.folder,))
    killer.start()
    result = job.run()
    killer.join()
    assert "died with <Signals.SIGKILL: 9>" in result["error"]
    assert "takes more memory than there is" in result["error"]
    assert result["error"].endswith(f"See {job.folder / 'log.txt'}")
