# SPDX-License-Identifier: Apache-2.0

"""The tables of tests on changed images."""

import re
from typing import Any

import pandas as pd
import pytest
from jsonargparse import ArgumentError

from anomalib_dhkd.benchmark.changes import SETS
from anomalib_dhkd.benchmark.robustness import colours, flatten_rows, parse_sets, percentages, robustness_tables

AUROC = {
    ("A", "bottle"): {"unchanged": 1.0, "5 % dimmer": 0.9, "noise 2 %": 0.8, "ADShift contrast": 0.7},
    ("<b>", "bottle"): {"unchanged": 0.6, "5 % dimmer": 0.6, "noise 2 %": 0.35, "ADShift contrast": 0.1},
    ("A", "grid"): {"unchanged": 0.8, "5 % dimmer": 0.9, "noise 2 %": 0.6, "ADShift contrast": 0.5},
}


def _rows() -> pd.DataFrame:
    jobs: list[dict[str, Any]] = [
        {
            "model": model,
            "data": data,
            "seed": seed,
            "folder": "f",
            # The two seeds lie around the value.
            "rows": [
                {"change": change, "image_AUROC": value + 0.01 * (2 * seed - 1), "misses": 1 - value}
                for change, value in values.items()
            ],
        }
        for (model, data), values in AUROC.items()
        for seed in (0, 1)
    ]
    return flatten_rows(pd.DataFrame([*jobs, {"error": "It failed."}]))


def test_percentages() -> None:
    table = percentages(_rows(), "image_AUROC")
    assert list(table.columns) == [
        "unchanged", "5 % dimmer", "noise 2 %", "line, mean", "ADShift contrast", "ADShift, mean"
    ]  # fmt: skip
    # The second model has no mean, because grid is missing.
    assert list(table.index) == [("mean", "A"), ("bottle", "A"), ("bottle", "<b>"), ("grid", "A")]
    assert list(table.loc["bottle", "A"]) == pytest.approx([100, 90, 80, 85, 70, 70])
    assert list(table.loc["mean", "A"]) == pytest.approx([90, 90, 70, 80, 60, 60])


def test_colours_show_the_loss() -> None:
    def shares(measure: str) -> pd.DataFrame:
        styles = colours(percentages(_rows(), measure), measure)
        return styles.map(lambda style: float(re.fullmatch(r"background-color: rgba\(.*, (.*)\)", style)[1]))

    expected = [0, 0.4, 0.8, 0.6, 1, 1]  # losses of 0, 10, 20, 15, 30 and 30 points
    assert list(shares("image_AUROC").loc["bottle", "A"]) == pytest.approx(expected)
    assert list(shares("misses").loc["bottle", "A"]) == pytest.approx(expected)
    assert shares("image_AUROC").loc[("grid", "A"), "5 % dimmer"] == 0  # a gain


def test_tables_as_text_and_html() -> None:
    found = {title: (table, html) for title, table, html in robustness_tables(_rows())}
    assert len(found) == 2  # of what was measured
    table, html = found["image AUROC [%] on changed images"]
    assert list(table.loc[1, ["data", "model", "noise 2 %"]]) == ["bottle", "A", "80.0"]
    assert "<b>" not in html
    assert "&lt;b&gt;" in html
    assert "rgba(220, 60, 40, 0.80)" in html


def test_no_job_no_table() -> None:
    assert list(robustness_tables(flatten_rows(pd.DataFrame([{"error": "It failed."}])))) == []


def test_sets() -> None:
    assert parse_sets({"sets": ["ADShift", "line"]}) == [*SETS["line"], *SETS["ADShift"]]
    assert parse_sets({"sets": ["ADShift"]}) == list(SETS["ADShift"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sets": ["lines"]}, "robustness.sets.*'line', 'ADShift'.*lines"),
        ({"sets": "line"}, "robustness.sets.*line"),
        ({"set": ["line"]}, "robustness.set"),
        ({"sets": ["line"], "severity": 3}, "robustness.severity"),
    ],
)
def test_a_wrong_section_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.compile(message, re.DOTALL)):
        parse_sets(section)
