# SPDX-License-Identifier: Apache-2.0

"""Throughput of ``watch`` beside OpenVINO's own ``benchmark_app``: ``python -m anomalib_dhkd.benchmark.throughput``.

Both take turns, so that what else runs on the machine hits both alike. ``benchmark_app`` infers one random image again
and again. ``watch`` reads files and writes lines, too.
"""

import json
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from anomalib.data.utils import get_image_filenames
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from PIL import Image

WARM_UP = 20
"""Lines of ``watch`` that aren't counted."""


def benchmark_app(model: Path, device: str, precision: str, size: tuple[int, int], seconds: int) -> float:
    """Return the images a second that ``benchmark_app`` infers; ``size`` is width and height."""
    options = {
        "-m": model, "-d": device, "-infer_precision": precision, "-hint": "throughput", "-t": seconds,
        "-shape": f"[1,3,{size[1]},{size[0]}]",
    }  # fmt: skip
    command = [str(Path(sys.executable).with_name("benchmark_app"))]
    command += [str(part) for option in options.items() for part in option]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    return float(re.findall(r"Throughput:\s+([\d.]+) FPS", output)[0])


def watch(model: Path, device: str, precision: str, files: list[Path]) -> float:
    """Return the images a second that ``watch`` does, once it is under way."""
    with TemporaryDirectory() as folder:
        source, output = Path(folder) / "source", Path(folder) / "lines.jsonl"
        source.mkdir()
        for number, file in enumerate(files):
            (source / f"{number:06}{file.suffix}").symlink_to(file.resolve())
        options = {"--model": model, "--source": source, "--output": output, "--device": device}
        command = [sys.executable, "-m", "anomalib_dhkd", "watch", "--precision", precision]
        command += [str(part) for option in options.items() for part in option]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603
            while not output.exists() or output.read_bytes().count(b"\n") < len(files):
                if process.poll() is not None:
                    raise subprocess.CalledProcessError(process.returncode, command)
                time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in output.read_text().splitlines()]
    failed = [line["error"] for line in lines if "error" in line]
    if failed:
        msg = f"source must hold images that the model takes, got {failed[0]}"
        raise ValueError(msg)
    times = [datetime.fromisoformat(line["time"]) for line in lines[WARM_UP:]]
    return (len(times) - 1) / (max(times) - min(times)).total_seconds()


def compare(
    model: Path,
    source: Path,
    device: str = "CPU",
    precision: str = "f32",
    images: PositiveInt = 500,
    seconds: PositiveInt = 10,
    rounds: PositiveInt = 3,
) -> None:
    """Print how many images a second ``watch`` and ``benchmark_app`` do, and the ratio.

    Args:
        model (Path): The exported OpenVINO model (.xml).
        source (Path): Folder with images of one size.
        device (str): OpenVINO's name of the device. Defaults to ``"CPU"``.
        precision (str): Precision of the arithmetic. Defaults to ``"f32"``.
        images (int): Images that ``watch`` does in each round, the folder's again and again. Defaults to 500.
        seconds (int): Seconds that ``benchmark_app`` takes in each round. Defaults to 10.
        rounds (int): Turns of each. Defaults to 3.
    """
    if images <= WARM_UP + 1:
        msg = f"images must be above {WARM_UP + 1}, got {images}."
        raise ValueError(msg)
    found = get_image_filenames(source)
    with Image.open(found[0]) as image:
        size = image.size
    files = list(islice(cycle(found), images))
    apps, watches = [], []
    for number in range(rounds):
        apps.append(benchmark_app(model, device, precision, size, seconds))
        watches.append(watch(model, device, precision, files))
        figures = f"benchmark_app {apps[-1]:.2f}, watch {watches[-1]:.2f} images a second"
        print(f"round {number + 1}: {figures}", flush=True)  # noqa: T201
    ratios = [of_watch / of_app for of_watch, of_app in zip(watches, apps, strict=True)]
    print(  # noqa: T201
        f"median: benchmark_app {median(apps):.2f}, watch {median(watches):.2f} images a second, "
        f"ratio {median(ratios):.3f}"
    )


if __name__ == "__main__":
    auto_cli(compare, as_positional=False)
