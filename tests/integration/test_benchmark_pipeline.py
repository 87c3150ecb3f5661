# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_dhkd benchmark`` with the real models, small, on the quickstart data."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from anomalib_dhkd.benchmark.report import reported
from anomalib_dhkd.benchmark.work import METRICS
from tests.conftest import SMALL

BACKBONE = {"backbone": "efficientnet_lite0_bundled", "layers": ["blocks.2", "blocks.4"]}
MODELS = {
    "DHKD": {"class_path": "anomalib_dhkd.Dhkd", "init_args": SMALL | {"train_steps": 4}},
    "PaDiM": {
        "class_path": "Padim",
        "init_args": {**BACKBONE, "n_features": 50},
        "trainer": {"max_epochs": 1},
    },
    "Stfpm": {"class_path": "Stfpm", "init_args": BACKBONE, "trainer": {"max_epochs": 1}},
    "CFlow": {"class_path": "Cflow", "init_args": BACKBONE, "trainer": {"max_epochs": 1}},
    # Only found when the model is built.
    "broken": {"class_path": "Padim", "init_args": {"backbone": "no_such_backbone"}},
}


def _configuration(folder: Path, root: Path, models: list[str], **changes: Any) -> Path:
    settings = {
        "results_dir": str(folder / "results"),
        "benchmark": {
            "image_size": 64,
            "seed": 0,
            "model": {"grid": [{"name": name, **MODELS[name]} for name in models]},
            "data": {
                "class_path": "anomalib_dhkd.Quickstart",
                "init_args": {
                    "root": str(root), "num_train": 8, "num_test": 2, "train_batch_size": 4, "num_workers": 0
                },
            },
        },
        "inference": {"image_size": 64, "rounds": 2},
        **changes,
    }  # fmt: skip
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _command(configuration: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "anomalib_dhkd", "benchmark", "--config", str(configuration), *options]


def _run(configuration: Path, *options: str) -> subprocess.CompletedProcess:
    command = _command(configuration, *options)
    return subprocess.run(command, cwd=configuration.parent, capture_output=True, text=True, check=False)


def _results(configuration: Path) -> pd.DataFrame:
    return pd.read_csv(configuration.parent / "results" / "results.csv").set_index("model")


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory, quickstart_root: Path) -> Path:
    """Configuration of a finished benchmark of all models, one job at a time."""
    configuration = _configuration(tmp_path_factory.mktemp("serial"), quickstart_root, list(MODELS), reported=True)
    completed = _run(configuration)
    assert completed.returncode == 1, completed.stdout + completed.stderr  # one job is broken
    assert "5 done, 0 running, 0 left" in completed.stdout
    assert "broken Quickstart 0 failed" in completed.stdout
    return configuration


def test_results(serial: Path) -> None:
    results = _results(serial)
    assert list(results.index) == list(MODELS)
    good = results.drop(index="broken")
    assert good[list(METRICS)].map(lambda value: 0 <= value <= 1).all(axis=None)
    assert (good[["training [s]", "test [s]", "peak memory [GiB]", "steps"]] > 0).all(axis=None)
    assert good["error"].isna().all()
    assert "no_such_backbone" in results.loc["broken", "error"]
    assert good[["python", "torch", "anomalib", "openvino", "CPU", "cores"]].notna().all(axis=None)
    rows = json.loads((serial.parent / "results" / "results.json").read_text())
    assert [row["settings"]["model"]["name"] for row in rows if row.get("settings", {}).get("model")] == list(MODELS)
    inference = pd.DataFrame(rows[-1]["rows"])
    assert set(inference["model"]) == set(good.index)
    ways = {(row["model"], row["runs in"]) for row in rows[-1]["rows"]}
    assert ways >= {(model, way) for model in good.index for way in ("torch CPU", "OpenVINO f32")}
    assert (inference[["latency [ms]", "images/s", "size [MB]"]] > 0).all(axis=None)


def test_metrics_are_those_of_the_predictions(serial: Path) -> None:
    """Against scikit-learn."""
    results = _results(serial).drop(index="broken")
    for row in results.itertuples():
        predictions = np.load(Path(row.folder) / "predictions.npz")
        assert row.image_AUROC == pytest.approx(roc_auc_score(predictions["label"], predictions["score"]), abs=1e-6)
        expected = average_precision_score(predictions["label"], predictions["score"])
        assert row.image_AUPR == pytest.approx(expected, abs=1e-6)
        curves = np.load(Path(row.folder) / "curves.npz")
        rates, recall = curves["pixel_ROC"]
        assert row.pixel_AUROC == pytest.approx(auc(rates, recall), abs=5e-3)
        rates, overlap = curves["pixel_PRO"]
        assert row.pixel_AUPRO == pytest.approx(auc(rates, overlap) / 0.3, abs=5e-3)


def test_report(serial: Path) -> None:
    page, text = ((serial.parent / "results" / name).read_text() for name in ("report.html", "results.md"))
    for content in (page, text):
        for title in ("image AUROC", "pixel AUPRO", "Cost of training", "Inference side by side", "What differs"):
            assert title in content
        assert "DHKD (reported by the authors, not reproduced)" in content
        assert "no_such_backbone" in content
    assert page.count("data:image/png;base64,") == 3  # quality and latency, curves, cases
    assert "http://" not in page
    assert "https://" not in page


def test_reported_figures() -> None:
    detection, localisation = (reported(metric, ["bottle", "grid"]) for metric in ("image_AUROC", "pixel_AUROC"))
    means = {row.split(" (")[0]: round(mean, 2) for row, mean in [*detection["all 15"].items()]}
    assert means["RKD"] == 98.47
    means = {row.split(" (")[0]: round(mean, 2) for row, mean in [*localisation["all 15"].items()]}
    assert means["SPADE"] == 96.03
    assert means["RIAD"] == 93.94
    assert means["CutPaste"] == 95.60
    assert means["DHKD"] == 98.67
    row = detection.loc["DHKD (reported by the authors, not reproduced)"]
    assert list(row[["bottle", "grid", "mean"]]) == [99.7, 99.8, 99.75]


def _works_in(folder: Path) -> bool:
    """Return whether a job's process works in a folder (Linux)."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            command = path.read_bytes()
            if b"benchmark.work" in command and str(folder).encode() in command:
                return True
    return False


def test_killed_and_continued_by_two_workers(serial: Path, quickstart_root: Path, tmp_path: Path) -> None:
    configuration = _configuration(tmp_path, quickstart_root, ["DHKD", "PaDiM", "Stfpm"])
    results = tmp_path / "results"
    process = subprocess.Popen(
        _command(configuration), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    while not list(results.glob("jobs/*/result.json")) or len(list(results.glob("jobs/*/job.yaml"))) < 2:
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    (finished,) = results.glob("jobs/*/result.json")
    before = finished.stat().st_mtime_ns
    deadline = time.monotonic() + 30
    while _works_in(results):  # the job that ran ends with its parent
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (results / "results.csv").exists()

    completed = _run(configuration, "--workers", "2")
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert finished.stat().st_mtime_ns == before
    metrics = list(METRICS)
    models = ["DHKD", "PaDiM", "Stfpm"]
    pd.testing.assert_frame_equal(_results(configuration)[metrics], _results(serial).loc[models, metrics])


def test_dask_workers_give_the_same(serial: Path, quickstart_root: Path, tmp_path: Path) -> None:
    """With the commands that the README names."""
    pytest.importorskip("distributed", reason="the extra 'dask' is not installed")
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> None:
            process = stack.enter_context(subprocess.Popen([*dask, *arguments, *common], cwd=tmp_path))
            stack.callback(process.terminate)

        start("scheduler", "--host", "127.0.0.1", "--port", "0")
        deadline = time.monotonic() + 60
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for _ in range(2):
            start("worker", "--nthreads", "1", "--no-nanny")
        configuration = _configuration(
            tmp_path, quickstart_root, ["DHKD", "PaDiM"], scheduler=json.loads(file.read_text())["address"]
        )
        completed = _run(configuration)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    metrics = list(METRICS)
    pd.testing.assert_frame_equal(_results(configuration)[metrics], _results(serial).loc[["DHKD", "PaDiM"], metrics])


def test_interrupt_keeps_what_is_finished(quickstart_root: Path, tmp_path: Path) -> None:
    configuration = _configuration(tmp_path, quickstart_root, ["PaDiM", "Stfpm"])
    # Tests in the background of a script are deaf to SIGINT, and so would be what they start.
    command = ["env", "--default-signal=INT", *_command(configuration)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("results/jobs/*/job.yaml"))) < 2:
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "goes on from the jobs finished" in output
    assert [path.parent.name.split("-")[0] for path in tmp_path.glob("results/jobs/*/result.json")] == [
        "PaDiM_Quickstart_0"
    ]


@pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="Chromium and its driver are not installed (`make browser`)",
)
def test_report_in_a_browser(serial: Path) -> None:
    from selenium import webdriver  # noqa: PLC0415
    from selenium.webdriver.common.by import By  # noqa: PLC0415

    options = webdriver.ChromeOptions()
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
    ):
        options.add_argument(f"--{argument}")
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get((serial.parent / "results" / "report.html").as_uri())
        assert driver.title == "Benchmark"
        pictures = driver.find_elements(By.TAG_NAME, "img")
        assert len(pictures) == 3
        assert all(int(picture.get_property("naturalWidth")) > 100 for picture in pictures)
        table = driver.find_element(By.CSS_SELECTOR, "table.sortable")

        def column() -> list[str]:
            return [
                row.find_elements(By.TAG_NAME, "td")[1].text for row in table.find_elements(By.CSS_SELECTOR, "tbody tr")
            ]

        before = column()
        head = table.find_elements(By.TAG_NAME, "th")[1]
        head.click()
        descending = [float(text) for text in column() if text]
        assert descending == sorted(descending, reverse=True)
        head.click()
        ascending = [float(text) for text in column() if text]
        assert ascending == sorted(ascending)
        assert sorted(column()) == sorted(before)
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acelerator": "cpu"}, "acelerator in the configuration must be some of accelerator, benchmark"),
        ({"accelerator": "tpu"}, "accelerator must be 'cpu' or 'cuda', got 'tpu'"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_wrong_configuration_is_refused(
    changes: dict[str, Any], message: str, quickstart_root: Path, tmp_path: Path
) -> None:
    completed = _run(_configuration(tmp_path, quickstart_root, ["PaDiM"], **changes))
    assert completed.returncode != 0
    assert message in " ".join(completed.stderr.split())
    assert not (tmp_path / "results").exists()


def test_wrong_argument_of_a_model_is_found_before_the_first_job(quickstart_root: Path, tmp_path: Path) -> None:
    configuration = _configuration(tmp_path, quickstart_root, ["PaDiM", "Stfpm"])
    settings = yaml.safe_load(configuration.read_text())
    model = settings["benchmark"]["model"]["grid"][1]
    for entry, message in ((model["init_args"], "Option 'layer' is not accepted"), (model, "model must have some of")):
        entry["layer"] = "blocks.2"
        configuration.write_text(yaml.safe_dump(settings))
        completed = _run(configuration)
        assert completed.returncode != 0
        assert message in " ".join(completed.stderr.split())
        del entry["layer"]
    assert not (tmp_path / "results").exists()
