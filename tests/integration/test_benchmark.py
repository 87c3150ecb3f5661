# SPDX-License-Identifier: Apache-2.0

"""The measurements behind the documentation, small, on the quickstart data."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from anomalib_dhkd import Quickstart
from anomalib_dhkd.benchmark import fusion, scores
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
    measured = fusion.distances(held_out_quickstart, 0, tmp_path, **SMALL, train_steps=4)
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
