# SPDX-License-Identifier: Apache-2.0

"""Many images: what a line makes in a week. ``make test-load`` runs these and prints the figures."""

import json
import re
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.data import Folder
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from PIL import Image

from anomalib_dhkd import Dhkd, Quickstart
from anomalib_dhkd.benchmark.environment import peak_memory
from tests.helpers import fit, small_dhkd

pytestmark = [pytest.mark.load, pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of memory")]


def _many(folder: Path, size: int, count: int) -> Path:
    """Make a folder with images, a hundred of which differ."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        file = folder / f"{number:05}.png"
        if number < 100:
            Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
        else:
            file.hardlink_to(folder / f"{number % 100:05}.png")
    return folder


def _peak(work: Any, *arguments: Any) -> float:
    """Do the work in a process of its own, and return the most memory that it took, in MiB."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (work, *arguments))


def _measured(work: Any, *arguments: Any) -> float:
    work(*arguments)
    return 1024 * peak_memory()


def _train(root: Path, results: Path, count: int) -> None:
    """Train on the first images at 192 px, without views, of which each would take as long as an image."""
    chosen = root / f"first_{count}"
    chosen.mkdir()
    for file in sorted((root / "good").iterdir())[:count]:
        (chosen / file.name).hardlink_to(file)
    data = Folder(
        "many", normal_dir=chosen.name, root=root, abnormal_dir="bad", normal_test_dir="good_test", num_workers=0
    )
    model = Dhkd(num_views=0, cache_limit=1.0, pre_processor=Dhkd.configure_pre_processor((192, 192)))
    fit(data, results, model)
    assert model.finished


def test_twenty_thousand_training_images(tmp_path: Path) -> None:
    """Features above ``cache_limit`` are in a file: memory stays where it is with less of them than the limit."""
    _many(tmp_path / "good", 192, 20_000)
    _many(tmp_path / "good_test", 192, 4)
    _many(tmp_path / "bad", 192, 4)
    figures = {}
    for count in (4_000, 20_000):  # of 78 kB of features each: a third of a GiB, and one and a half
        start = time.monotonic()
        figures[count] = _peak(_train, tmp_path, tmp_path / f"results_{count}", count)
        print(f"{count} training images: {time.monotonic() - start:.0f} s, {figures[count]:.0f} MiB")  # noqa: T201
    assert figures[20_000] < figures[4_000] + 1024


def _validate(root: Path, checkpoint: Path, count: int) -> None:
    data = Folder(
        "large", normal_dir="good", root=root, abnormal_dir=f"bad_{count}", mask_dir=f"mask_{count}", num_workers=0,
        normal_test_dir="good_test", eval_batch_size=4, val_split_mode="same_as_test",
    )  # fmt: skip
    Engine(default_root_dir=root / "results", enable_progress_bar=False).validate(
        model=Dhkd.load_from_checkpoint(checkpoint), datamodule=data
    )


def test_five_hundred_large_validation_images_with_masks(tmp_path: Path, trained_checkpoint: Path) -> None:
    for folder in ("good", "good_test"):
        _many(tmp_path / folder, 1024, 4)
    figures = {}
    for count in (50, 500):
        _many(tmp_path / f"bad_{count}", 1024, count)
        masks = tmp_path / f"mask_{count}"
        masks.mkdir()
        for number in range(count):
            mask = np.zeros((1024, 1024), dtype=np.uint8)
            mask[number : number + 99, :99] = 255
            Image.fromarray(mask).save(masks / f"{number:05}.png")
        start = time.monotonic()
        figures[count] = _peak(_validate, tmp_path, trained_checkpoint, count)
        print(f"{count} validation images: {time.monotonic() - start:.0f} s, {figures[count]:.0f} MiB")  # noqa: T201
    assert figures[500] < figures[50] + 1024


def _resident(process: subprocess.Popen) -> float:
    """Return the memory of a process in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def test_a_week_of_watch_in_small(quickstart: Quickstart, tmp_path: Path) -> None:
    """Ten thousand images, fifty of them broken, and two restarts, one of them after ``kill -9``."""
    model = small_dhkd(train_steps=8)
    engine, _ = fit(quickstart, tmp_path, model)
    path = engine.export(model, ExportType.OPENVINO, export_root=tmp_path)
    source, output = _many(tmp_path / "source", 64, 10_000), tmp_path / "lines.jsonl"
    broken = sorted(source.iterdir())[150::200]
    for file in broken:
        file.unlink()
        file.write_bytes(b"no image")
    assert len(broken) == 50
    command = [sys.executable, "-m", "anomalib_dhkd", "watch", "--model", str(path), "--source", str(source)]
    command += ["--output", str(output), "--heat_maps", str(tmp_path / "maps")]

    def count() -> int:
        return output.read_bytes().count(b"\n") if output.exists() else 0

    figures: list[tuple[int, float]] = []
    for until, end in ((3_000, signal.SIGTERM), (6_000, signal.SIGKILL), (10_000, signal.SIGTERM)):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            begin = count()
            while (done := count()) < until:
                assert process.poll() is None
                if done > begin + 500:
                    figures.append((done, _resident(process)))
                time.sleep(1)
            process.send_signal(end)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    print(*(f"{done} lines: {memory:.0f} MiB" for done, memory in figures[:: max(1, len(figures) // 12)]), sep="\n")  # noqa: T201
    assert len(lines) == len({line["file"] for line in lines}) == 10_000
    assert {line["file"] for line in lines if "error" in line} == {file.name for file in broken}
    assert sum(file.suffix == ".png" for file in (tmp_path / "maps").rglob("*")) == 9_950
    last = [memory for done, memory in figures if done > 6_500]
    assert max(last) < min(last) + 64
