# SPDX-License-Identifier: Apache-2.0

"""``python -m anomalib_dhkd benchmark`` with the real models, small, on the quickstart data."""

import contextlib
import importlib
import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from jsonargparse import ArgumentError
from pictures import write_pictures
from PIL import Image
from sklearn.metrics import auc, average_precision_score, roc_auc_score
from torchvision.transforms.v2.functional import resize

from anomalib_dhkd import Quickstart
from anomalib_dhkd.benchmark.changes import SETS, ChangeImages
from anomalib_dhkd.benchmark.inference import can_be_loaded
from anomalib_dhkd.benchmark.parity import FORMATS
from anomalib_dhkd.benchmark.pipeline import Benchmark
from anomalib_dhkd.benchmark.report import reported
from anomalib_dhkd.benchmark.work import METRICS, load, measure_again, measure_inference, train_and_test
from tests.helpers import PATIENCE, SMALL, job_processes, opened

BACKBONE = {"backbone": "efficientnet_lite0_bundled", "layers": ["blocks.1", "blocks.2"]}
MODELS = {
    "DHKD": {"class_path": "anomalib_dhkd.Dhkd", "init_args": SMALL | BACKBONE | {"train_steps": 4}},
    "PaDiM": {
        "class_path": "Padim",
        "init_args": {**BACKBONE, "n_features": 50},
        "trainer": {"max_epochs": 1},
    },
    "CFlow": {
        "class_path": "Cflow",
        "init_args": {**BACKBONE, "coupling_blocks": 1},
        "trainer": {"max_epochs": 1},
    },
    # Only found when the model is built.
    "broken": {"class_path": "Padim", "init_args": {"backbone": "no_such_backbone"}},
}
INFERENCE = {
    "image_size": 64,
    "rounds": 2,
    "precisions": ["f32", "bf16"],
    "backbone": BACKBONE,
    "operations": True,
    "accuracy": True,
}


def _configuration(folder: Path, root: Path, models: list[str], **changes: Any) -> Path:
    data = {"root": str(root), "num_train": 8, "num_test": 2, "train_batch_size": 4, "num_workers": 0}
    Quickstart(**data).prepare_data()  # before two workers do it at the same time
    settings = {
        "results_dir": str(folder / "results"),
        "benchmark": {
            "image_size": 64,
            "seed": 0,
            "model": {"grid": [{"name": name, **MODELS[name]} for name in models]},
            "data": {"class_path": "anomalib_dhkd.Quickstart", "init_args": data},
        },
        **changes,
    }
    path = folder / "benchmark.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _command(configuration: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "anomalib_dhkd", "benchmark", "--config", str(configuration), *options]


def _run(configuration: Path, *options: str) -> subprocess.CompletedProcess:
    command = _command(configuration, *options)
    return subprocess.run(command, cwd=configuration.parent, capture_output=True, text=True, check=False)


def _run_here(configuration: Path, *options: str) -> None:
    """Run the benchmark without a process of its own, which takes many seconds to start; its jobs have theirs."""
    Benchmark().run(Benchmark.get_parser().parse_args(["--config", str(configuration), *options]))


def _results(configuration: Path) -> pd.DataFrame:
    return pd.read_csv(configuration.parent / "results" / "results.csv").set_index("model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, quickstart_root: Path) -> Path:
    """Configuration of a finished benchmark of all models."""
    folder = tmp_path_factory.mktemp("finished")
    sections = {"inference": INFERENCE, "robustness": {"sets": ["ADShift"]}}
    configuration = _configuration(folder, quickstart_root, list(MODELS), reported=True, **sections)
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
        _run_here(configuration, "--workers", "2")
    assert ended.value.code == 1  # one job is broken
    assert "4 done, 0 running, 0 left" in output.getvalue()
    assert "broken Quickstart 0 failed" in output.getvalue()
    return configuration


def test_results(finished: Path) -> None:
    results = _results(finished)
    assert list(results.index) == list(MODELS)
    good = results.drop(index="broken")
    assert good[list(METRICS)].map(lambda value: 0 <= value <= 1).all(axis=None)
    assert (good[["training [s]", "test [s]", "peak memory [GiB]", "steps"]] > 0).all(axis=None)
    assert good["error"].isna().all()
    shifts = good[["teacher_shift", "student_shift"]]
    assert (shifts.loc["DHKD"] > 0).all()
    assert shifts.drop(index="DHKD").isna().all(axis=None)
    assert "no_such_backbone" in results.loc["broken", "error"]
    assert good[["python", "torch", "anomalib", "openvino", "CPU", "cores"]].notna().all(axis=None)
    rows = json.loads((finished.parent / "results" / "results.json").read_text())
    assert [row["settings"]["model"]["name"] for row in rows if row.get("settings", {}).get("model")] == list(MODELS)
    inference = pd.DataFrame(rows[-1]["rows"])
    assert set(inference["model"]) == {"bare backbone", *good.index}
    ways = {(row["model"], row["runs in"]) for row in rows[-1]["rows"]}
    assert ways >= {
        (model, way)
        for model in ("bare backbone", *good.index)
        for way in ("torch CPU", "OpenVINO f32", "OpenVINO bf16")
    }
    assert (inference[["latency [ms]", "images/s", "size [MB]"]] > 0).all(axis=None)
    assert (inference.loc[inference["model"] == "bare backbone", "times first"] == 1).all()
    assert (inference.loc[inference["model"] != "bare backbone", "times first"] > 0).all()
    # What the exported files detect is what the test has found.
    for precision, tolerance in (("f32", 0.1), ("bf16", 1)):
        detected = inference[inference["runs in"] == f"OpenVINO {precision}"].set_index("model")
        for model in ("DHKD", "PaDiM"):  # CFlow's scores depend on the other images of a batch
            pixel = 100 * results.loc[model, "pixel_AUROC"]
            assert detected.loc[model, "pixel AUROC [%]"] == pytest.approx(pixel, abs=tolerance)
            image = 100 * results.loc[model, "image_AUROC"]
            assert abs(detected.loc[model, "image AUROC [%]"] - image) < 100 * tolerance / 9  # two of 20 pairs in bf16


def test_time_by_operation(finished: Path) -> None:
    rows = json.loads((finished.parent / "results" / "results.json").read_text())[-1]["operations"]
    operations = pd.DataFrame(rows).set_index(["model", "operation"])
    for model in ("bare backbone", "DHKD", "PaDiM", "CFlow"):
        times = operations.loc[model]
        assert "Convolution" in times.index
        for precision in ("f32 [ms]", "bf16 [ms]"):
            assert times.loc["all", precision] > times.loc["Convolution", precision] > 0
            assert times.loc["all", precision] == pytest.approx(times[precision].drop("all").sum())
    assert "MatMul" in operations.loc["DHKD"].index


def test_a_benchmark_whose_every_job_fails_says_why(
    quickstart_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {"inference": INFERENCE, "robustness": {"sets": ["ADShift"]}, "parity": {"formats": ["torch"]}}
    configuration = _configuration(tmp_path, quickstart_root, ["broken"], **sections)
    with pytest.raises(SystemExit) as ended:
        _run_here(configuration)
    assert ended.value.code == 1
    assert "no_such_backbone" in capsys.readouterr().out
    for name in ("report.html", "results.md", "results.csv"):
        assert "no_such_backbone" in (tmp_path / "results" / name).read_text()


def test_a_training_that_takes_too_long_is_said_to_be_unfinished(finished: Path, tmp_path: Path) -> None:
    results = _results(finished)
    settings = yaml.safe_load((Path(results.loc["CFlow", "folder"]) / "job.yaml").read_text())
    row = train_and_test(settings | {"trainer": {"max_epochs": 100, "max_time": "00:00:00:01"}}, tmp_path)
    assert not row["finished"]
    assert row["epochs"] < 100
    assert results.drop(index="broken")["finished"].all()


@pytest.mark.slow
@pytest.mark.no_cover  # tracing the exporters would more than double their time
def test_int8(finished: Path, tmp_path: Path) -> None:
    models = {"DHKD": _results(finished).loc["DHKD", "folder"]}
    found = measure_inference({"models": models, "inference": INFERENCE | {"precisions": ["INT8"]}}, tmp_path)
    rows = pd.DataFrame(found["rows"])
    rows = rows[rows["runs in"] == "OpenVINO INT8"].set_index("model")
    others = pd.DataFrame(json.loads((finished.parent / "results" / "results.json").read_text())[-1]["rows"])
    others = others[others["runs in"] == "OpenVINO f32"].set_index("model")
    operations = pd.DataFrame(found["operations"]).set_index(["model", "operation"])
    for name in ("bare backbone", "DHKD"):
        assert rows.loc[name, "size [MB]"] < others.loc[name, "size [MB]"]
        assert operations.loc[(name, "all"), "INT8 [ms]"] > 0
    assert rows.loc["DHKD", ["image AUROC [%]", "pixel AUROC [%]"]].between(0, 100).all()
    assert found["left_out"] == []
    (file,) = tmp_path.glob("1/weights/openvino/INT8.xml")
    assert can_be_loaded(file, 64)
    file.write_text(file.read_text()[:1000])
    assert not can_be_loaded(file, 64)


@pytest.mark.no_cover  # tracing the exporters would more than double their time
def test_parity(finished: Path, tmp_path: Path) -> None:
    """Files are resized from 256 pixels to 64."""
    settings = {"trained": _results(finished).loc["DHKD", "folder"], "parity": {"formats": list(FORMATS)[:3]}}
    found = measure_again(settings, tmp_path)
    assert (found["model"], found["data"]) == ("DHKD", "Quickstart")
    rows = pd.DataFrame(found["rows"]).set_index("format")
    assert list(rows.index) == ["torch", "ONNX", "OpenVINO"]
    assert (rows["score, largest"] < 1e-3).all()
    assert (rows["map, mean"] < 1e-3).all()
    assert (rows["labels"] == 0).all()
    assert (rows[[f"{name} [points]" for name in ("image AUROC", "pixel AUROC", "AUPRO")]].abs() < 0.05).all(axis=None)
    assert (rows[["size [MB]", "latency [ms]", "latency of 16 [ms]"]] > 0).all(axis=None)


def test_parity_of_a_model_with_another_transform(finished: Path, tmp_path: Path) -> None:
    settings = {"trained": _results(finished).loc["PaDiM", "folder"], "parity": {"formats": ["torch"]}}
    (row,) = measure_again(settings, tmp_path)["rows"]
    assert row["map, mean"] < 0.1
    assert row["latency [ms]"] > 0


def test_metrics_are_those_of_the_predictions(finished: Path) -> None:
    """Against scikit-learn."""
    results = _results(finished).drop(index="broken")
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


def _outside(page: str) -> list[str]:
    """Return what a page would load from elsewhere."""
    return [
        target for target in re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"'\s>)]+)", page) if target[:5] != "data:"
    ]


def test_report(finished: Path) -> None:
    page, text = ((finished.parent / "results" / name).read_text() for name in ("report.html", "results.md"))
    titles = (
        "image AUROC", "pixel AUPRO", "Shift of the responses", "Cost of training", "Inference side by side",
        "Time of one image by operation", "What differs",
    )  # fmt: skip
    for content in (page, text):
        for title in titles:
            assert title in content
        assert "DHKD (reported by the authors, not reproduced)" in content
        assert "no_such_backbone" in content
    # Quality and latency, image AUROC over the changes, curves, cases, changed images.
    assert page.count("data:image/png;base64,") == 5
    assert _outside(page) == []
    assert "http://" not in page
    assert "https://" not in page


def _changed_images(configuration: Path) -> pd.DataFrame:
    return pd.read_csv(configuration.parent / "results" / "robustness.csv").set_index(["model", "change"])


def test_changed_images(finished: Path) -> None:
    changed, results = _changed_images(finished), _results(finished).drop(index="broken")
    assert list(changed.index) == [
        (model, change) for model in results.index for change in ("unchanged", *SETS["ADShift"])
    ]
    assert (changed["data"] == "Quickstart").all()
    measures = ["image_AUROC", "pixel_AUROC", "pixel_AUPRO"]
    values = changed[[*measures, "false alarms", "misses"]]
    assert values.map(lambda value: 0 <= value <= 1).all(axis=None)
    pd.testing.assert_frame_equal(changed.xs("unchanged", level="change")[measures], results[measures])
    for model in results.index:
        assert not changed.loc[model, "pixel_AUROC"].duplicated().any()


def test_metrics_on_changed_images_are_those_of_the_model_on_them(finished: Path) -> None:
    """By hand and scikit-learn: files are changed, then resized; the model's labels are those of its threshold."""
    changed = _changed_images(finished)
    for name in ("DHKD", "PaDiM"):  # CFlow's scores depend on the other images of a batch
        model, datamodule = load(Path(_results(finished).loc[name, "folder"]))
        datamodule.prepare_data()
        datamodule.setup()
        items = list(datamodule.test_data)
        assert items[0].image.shape == (3, 256, 256)
        pairs = [ChangeImages("ADShift Gaussian noise")(item.image, item.gt_mask) for item in items]
        with torch.no_grad():
            found = model.eval()(torch.stack([resize(image, [64, 64]) for image, _ in pairs]))
        masks = torch.stack([resize(mask, [64, 64]) for _, mask in pairs])
        labels = np.array([int(item.gt_label) for item in items])
        row = changed.loc[name, "ADShift Gaussian noise"]
        expected = roc_auc_score(labels, found.pred_score.flatten())
        assert row["image_AUROC"] == pytest.approx(expected, abs=1e-6)
        expected = roc_auc_score(masks.flatten(), found.anomaly_map.flatten())
        assert row["pixel_AUROC"] == pytest.approx(expected, abs=1e-4)
        alarms = found.pred_label.flatten().numpy()
        assert row["false alarms"] == pytest.approx(alarms[labels == 0].mean())
        assert row["misses"] == pytest.approx(1 - alarms[labels == 1].mean())


def test_report_of_changed_images(finished: Path) -> None:
    page, text = ((finished.parent / "results" / name).read_text() for name in ("report.html", "results.md"))
    for content in (page, text):
        for title in ("image AUROC [%] on", "pixel AUROC [%] on", "pixel AUPRO [%] on", "False alarms on", "Misses on"):
            assert f"## {title} changed images" in content or f"<h2>{title} changed images" in content
        assert "ADShift, mean" in content
        assert "the deeper the red" in content
    assert "background-color: rgba(220, 60, 40, " in page
    assert "first defective image under each change" in page
    assert "<h2>Image AUROC under each change" in page
    # Each model has looked at the same image.
    strips = [np.load(path) for path in sorted((finished.parent / "results").glob("jobs/*/strip.npz"))]
    assert len(strips) == 3
    for strip in strips:
        assert list(strip["change"]) == ["unchanged", *SETS["ADShift"]]
        assert np.array_equal(strip["image"], strips[0]["image"])
        assert strip["image"].shape == (5, 3, 128, 128)
        assert len({heat_map.tobytes() for heat_map in strip["map"]}) == 5


def test_pictures_of_the_documentation(finished: Path, tmp_path: Path) -> None:
    write_pictures(finished.parent / "results", tmp_path)
    plots = {name: (tmp_path / f"{name}.svg").read_text() for name in ("robustness", "quality_latency")}
    for model in ("DHKD", "PaDiM", "CFlow"):
        assert all(f">{model}</text>" in plot for plot in plots.values())
    for change in ("unchanged", *SETS["ADShift"], "ADShift, mean"):
        assert f">{change}</text>" in plots["robustness"]
    assert ">ADShift, mean</text>" in plots["quality_latency"]
    assert "broken" not in "".join(plots.values())
    with Image.open(tmp_path / "gallery.png") as gallery:
        assert gallery.size == (1000, 840)  # five kinds of defects
    assert {file.name for file in tmp_path.iterdir()} == {
        "architecture.svg",
        "gallery.png",
        *(f"{name}.svg" for name in plots),
    }
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    write_pictures(finished.parent / "results", tmp_path)
    assert before == {file: file.read_bytes() for file in tmp_path.iterdir()}


@pytest.mark.slow
def test_growth(quickstart_root: Path, tmp_path: Path) -> None:
    """Over numbers of images, of which some are repeated, and over sizes, of a model with an awkward name."""
    name = "<b>DHKD</b> $_ | 1"
    configuration = _configuration(tmp_path, quickstart_root, ["DHKD"])
    settings = yaml.safe_load(configuration.read_text())
    settings["benchmark"]["model"]["grid"][0]["name"] = name
    settings["benchmark"] |= {"image_size": {"grid": [64, 96]}, "train_images": {"grid": [6, 20]}}
    configuration.write_text(yaml.safe_dump(settings))
    _run_here(configuration, "--workers", "2")
    results = _results(configuration)
    assert list(results.index) == [f"{name}, {size} px, {count} images" for size in (64, 96) for count in (6, 20)]
    assert list(results["training images"]) == [6, 20, 6, 20]
    assert list(results["image size"]) == [64, 64, 96, 96]
    assert (results["peak memory [GiB]"] > 0.1).all()
    page, text = ((tmp_path / "results" / file).read_text() for file in ("report.html", "results.md"))
    assert "Growth of training with images and pixels" in page
    assert page.count("data:image/png;base64,") == 3  # growth, curves, cases
    assert "&lt;b&gt;DHKD&lt;/b&gt; $_ | 1, 64 px, 6 images" in page
    assert "<b>" not in page
    assert _outside(page) == []
    assert "<b>DHKD</b> $_ \\| 1, 64 px" in text
    assert "Inference side by side" not in page


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


def test_killed_and_continued_by_two_workers(finished: Path, quickstart_root: Path, tmp_path: Path) -> None:
    configuration = _configuration(tmp_path, quickstart_root, ["DHKD", "PaDiM", "CFlow"])
    results = tmp_path / "results"
    process = subprocess.Popen(
        _command(configuration), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    while not list(results.glob("jobs/*/result.json")) or len(list(results.glob("jobs/*/job.yaml"))) < 2:
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    (first,) = results.glob("jobs/*/result.json")
    before = first.stat().st_mtime_ns
    deadline = time.monotonic() + PATIENCE
    while job_processes(results):  # the job that ran ends with its parent
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (results / "results.csv").exists()

    _run_here(configuration, "--workers", "2")
    assert first.stat().st_mtime_ns == before
    metrics = list(METRICS)
    models = ["DHKD", "PaDiM", "CFlow"]
    pd.testing.assert_frame_equal(_results(configuration)[metrics], _results(finished).loc[models, metrics])


@pytest.mark.slow
def test_dask_workers_give_the_same(finished: Path, quickstart_root: Path, tmp_path: Path) -> None:
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
        deadline = time.monotonic() + PATIENCE
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
    pd.testing.assert_frame_equal(_results(configuration)[metrics], _results(finished).loc[["DHKD", "PaDiM"], metrics])


def test_interrupt_keeps_what_is_finished(quickstart_root: Path, tmp_path: Path) -> None:
    configuration = _configuration(tmp_path, quickstart_root, ["PaDiM", "CFlow"])
    # Tests in the background of a script are deaf to SIGINT, and so would be what they start.
    command = ["env", "--default-signal=INT", *_command(configuration)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("results/jobs/*/job.yaml"))) < 2:
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "goes on from the jobs finished" in output
    assert [path.parent.name.split("-")[0] for path in tmp_path.glob("results/jobs/*/result.json")] == [
        "PaDiM_Quickstart_0"
    ]


def test_report_in_a_browser(finished: Path) -> None:
    with opened(finished.parent / "results" / "report.html") as driver:
        assert driver.title == "Benchmark"
        pictures = driver.find_elements("tag name", "img")
        assert len(pictures) == 5
        assert all(int(picture.get_property("naturalWidth")) > 100 for picture in pictures)
        table = driver.find_element("css selector", "table.sortable")

        def column() -> list[str]:
            return [
                row.find_elements("tag name", "td")[1].text for row in table.find_elements("css selector", "tbody tr")
            ]

        before = column()
        head = table.find_elements("tag name", "th")[1]
        head.click()
        descending = [float(text) for text in column() if text]
        assert descending == sorted(descending, reverse=True)
        head.click()
        ascending = [float(text) for text in column() if text]
        assert ascending == sorted(ascending)
        assert sorted(column()) == sorted(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acelerator": "cpu"}, "acelerator in the configuration must be some of accelerator, benchmark"),
        ({"accelerator": "tpu"}, "accelerator must be 'cpu' or 'cuda', got 'tpu'"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"inference": {"precisions": ["f64"]}}, "f64"),
        ({"inference": {"round": 2}}, "round"),
        ({"robustness": {"sets": ["lines"]}}, "lines"),
        ({"parity": {"formats": ["CoreML"]}}, "CoreML"),
    ],
)
def test_wrong_configuration_is_refused(
    changes: dict[str, Any], message: str, quickstart_root: Path, tmp_path: Path
) -> None:
    configuration = _configuration(tmp_path, quickstart_root, ["PaDiM"], **changes)
    with pytest.raises((ValueError, ArgumentError), match=re.escape(message)):
        _run_here(configuration)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("init_args", "Option 'layer' is not accepted"),
        ("trainer", "Group 'trainer' does not accept option 'layer'"),
        (None, "model must have some of"),
    ],
)
def test_wrong_argument_of_a_model_is_found_before_the_first_job(
    section: str | None, message: str, quickstart_root: Path, tmp_path: Path
) -> None:
    configuration = _configuration(tmp_path, quickstart_root, ["PaDiM", "CFlow"])
    settings = yaml.safe_load(configuration.read_text())
    model = settings["benchmark"]["model"]["grid"][1]
    (model[section] if section else model)["layer"] = "blocks.2"
    configuration.write_text(yaml.safe_dump(settings))
    with pytest.raises((ValueError, ArgumentError), match=message):
        _run_here(configuration)
    assert not (tmp_path / "results").exists()


def test_a_package_that_is_missing_is_named_with_its_extra(
    quickstart_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, extra in (("nncf", "int8"), ("distributed", "dask"), ("tabulate", "benchmark")):
        monkeypatch.setitem(sys.modules, package, None)
        configuration = _configuration(
            tmp_path, quickstart_root, ["PaDiM"], inference={"precisions": ["INT8"]} if package == "nncf" else {},
            scheduler="127.0.0.1:1",
        )  # fmt: skip
        with pytest.raises(ModuleNotFoundError, match=rf"{package} must be installed .*anomalib-dhkd\[{extra}\]"):
            _run_here(configuration)
    assert not (tmp_path / "results").exists()


def test_other_subcommands_need_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("anomalib_dhkd.benchmark")]:
        monkeypatch.delitem(sys.modules, module)
    for package in ("jinja2", "tabulate", "nncf", "distributed"):
        monkeypatch.setitem(sys.modules, package, None)
    importlib.import_module("anomalib_dhkd.benchmark.pipeline")
