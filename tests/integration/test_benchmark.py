# SPDX-License-Identifier: Apache-2.0

"""The measurements behind the documentation, small, on the quickstart data."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from anomalib_dhkd import Quickstart
from anomalib_dhkd.benchmark import fusion, scores, speed
from tests.conftest import SMALL


@pytest.mark.parametrize("model", ["Padim", "Stfpm"])
def test_scores_of_built_in_models(model: str, quickstart: Quickstart, tmp_path: Path) -> None:
    table = scores.compare(model, quickstart, tmp_path)
    assert list(table["level"]) == ["image", "pixel"]
    assert ((table["rank-preserving"] - table["scikit-learn"]).abs() <= 1e-6).all()
    assert ((table["rank-preserving, OpenVINO"] - table["scikit-learn"]).abs() <= 1e-3).all()
    # PaDiM's distances are large: without normalisation the sigmoid in torchmetrics ties them.
    assert model != "Padim" or abs(table.loc["image", "stock, normalisation off"] - table["scikit-learn"]["image"]) > 0
    assert model in scores.markdown(table)


def test_fusion(held_out_quickstart: Quickstart, tmp_path: Path) -> None:
    networks = {name: value for name, value in SMALL.items() if name != "mixture"}  # fusion's own
    measured = fusion.distances(held_out_quickstart, 0, tmp_path, **networks, train_steps=4)
    assert [len(measured[split][0]) for split in ("train", "held_out", "test")] == [4, 4, 12]
    comparison = fusion.compare(measured)
    assert set(comparison["score"]) == {"mean", "max", "top 5 %", "top 1 %", "top 0.5 %", "pixel"}
    assert comparison["auroc"].between(0, 100).all()
    counts = fusion.false_alarms(measured, rates=[0.2, 0.5])
    assert list(counts["alarms, held_out"] <= counts["good"]) == [True, True]


def test_expected_alarms() -> None:
    """Against a simulation: as many alarms as scores of one distribution above the k-th smallest of others."""
    counts = pd.DataFrame({"good": [20, 41], "held_out": [41, 64], "rank": [38, 59]})
    totals = torch.zeros(20_000)
    for row in counts.itertuples():
        thresholds = torch.rand(20_000, row.held_out).sort(dim=1)[0][:, row.rank - 1]
        totals += (torch.rand(20_000, row.good) > thresholds[:, None]).sum(dim=1)
    lowest, highest = map(int, fusion.expected_alarms(counts).split(" to "))
    assert 0.95 <= ((totals >= lowest) & (totals <= highest)).float().mean() < 0.99


def test_speed(quickstart: Quickstart, tmp_path: Path) -> None:
    speed.main(
        data=quickstart, models=["Dhkd", "Padim"], image_size=64, rounds=2, images=[8, 20], image_sizes=[64, 96],
        results_dir=tmp_path, dhkd=SMALL | {"train_steps": 4},
    )  # fmt: skip
    training, inference, growth = (
        pd.read_csv(tmp_path / f"{name}.csv") for name in ("training", "inference", "growth")
    )
    assert list(training["model"]) == ["Dhkd", "Padim"]
    assert (training["peak memory [GiB]"] > 0.1).all()
    assert training["finished"].all()
    ways = {"torch CPU", *speed.PRECISIONS}
    # OpenVINO crashes on PaDiM in INT8, which must not end the benchmark.
    measured = set(zip(inference["model"], inference["runs in"], strict=True))
    assert measured >= {(name, way) for name in ("Backbone", "Dhkd", "Padim") for way in ways} - {
        ("Padim", "OpenVINO INT8")
    }
    assert (inference[["latency [ms]", "images/s", "size [MB]"]] > 0).all(axis=None)
    assert (inference.loc[inference["model"] == "Backbone", "times backbone"] == 1).all()
    operations = pd.read_csv(tmp_path / "profile.csv").set_index("operation")
    assert {"Convolution", "MatMul", "all"} <= set(operations.index)
    assert operations.loc["all", "f32 [ms]"] > operations.loc["Convolution", "f32 [ms]"] > 0
    accuracy = pd.read_csv(tmp_path / "accuracy.csv").set_index("runs in")
    assert set(accuracy.index) == set(speed.PRECISIONS)
    assert ((accuracy >= 0) & (accuracy <= 100)).all(axis=None)
    change = (accuracy.loc["OpenVINO bf16"] - accuracy.loc["OpenVINO f32"]).abs()
    assert change["pixel AUROC"] < 1
    assert change["image AUROC"] < 11  # two pairs of the 2 good and 10 defective images
    assert list(growth["images"]) == [8, 20, 8, 8]
    assert list(growth["image size"]) == [64, 64, 64, 96]
    assert (tmp_path / "growth.png").stat().st_size > 1000


def test_a_training_that_takes_too_long_is_said_to_be_unfinished(quickstart: Quickstart, tmp_path: Path) -> None:
    row = speed.train("Stfpm", quickstart, tmp_path, image_size=64, max_minutes=0.02, export=False)
    assert not row["finished"]
    assert row["epochs"] < 100
