# SPDX-License-Identifier: Apache-2.0

"""The plots of a benchmark's report."""

from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from anomalib_dhkd.benchmark.plots import plot_quality_and_latency, plot_robustness

CHANGES = ("unchanged", "5 % dimmer", "noise 2 %", "ADShift contrast")
COLUMNS = ["unchanged", "5 % dimmer", "noise 2 %", "line, mean", "ADShift contrast", "ADShift, mean"]
MODELS = {"A": (1.0, 0.9, 0.7, 0.5), "B $_": (0.8, 0.8, 0.6, 0.1)}


def _changed() -> pd.DataFrame:
    """Return two data sets and seeds around the values."""
    return pd.DataFrame(
        [
            {"model": model, "data": data, "seed": seed, "change": change}
            | {"image_AUROC": value + 0.02 * seed - 0.01 + offset, "pixel_AUROC": value / 2}
            for data, offset in (("bottle", -0.05), ("grid", 0.05))
            for model, values in MODELS.items()
            for seed in (0, 1)
            for change, value in zip(CHANGES, values, strict=True)
        ]
    )


def _lines(axis: Any, style: str) -> list[list[float]]:
    """Return the values of the lines of a style."""
    return [list(line.get_ydata()) for line in axis.get_lines() if line.get_linestyle() == style]


def test_robustness_has_each_model_and_change() -> None:
    figure = plot_robustness(_changed())
    (axis,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(MODELS)
    assert [label.get_text() for label in axis.get_yticklabels()] == COLUMNS
    bold = [label.get_text() for label in axis.get_yticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["line, mean", "ADShift, mean"]
    first, second = axis.get_lines()
    assert list(first.get_xdata()) == pytest.approx([100, 90, 70, 80, 50, 50])
    assert list(second.get_xdata()) == pytest.approx([80, 80, 60, 70, 10, 10])
    assert list(first.get_ydata()) == list(range(6))
    assert axis.yaxis_inverted()  # the unchanged images first
    assert first.get_color() != second.get_color()
    plt.close(figure)


@pytest.mark.parametrize("way", ["OpenVINO f32", "torch CPU"])
def test_quality_and_latency(way: str) -> None:
    changed = _changed()
    results = changed[changed["change"] == "unchanged"]
    rows = [{"model": model, "runs in": way, "latency [ms]": number} for number, model in enumerate(("bare", *MODELS))]
    figure = plot_quality_and_latency(results, pd.DataFrame(rows), changed)
    image, pixel = figure.axes
    assert way in image.get_xlabel()
    assert _lines(image, "-") == [pytest.approx([100, 80, 50]), pytest.approx([80, 70, 10])]
    assert _lines(pixel, "-") == [pytest.approx([50, 40, 25]), pytest.approx([40, 35, 5])]
    assert [line.get_xdata()[0] for line in image.get_lines() if line.get_linestyle() == "-"] == [1, 2]
    legends = [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]
    assert legends == [list(MODELS), ["unchanged", "line, mean", "ADShift, mean"]]
    plt.close(figure)


def test_quality_and_latency_without_changed_images() -> None:
    changed = _changed()
    rows = [{"model": model, "runs in": "OpenVINO f32", "latency [ms]": 1.0} for model in MODELS]
    figure = plot_quality_and_latency(changed[changed["change"] == "unchanged"], pd.DataFrame(rows), pd.DataFrame())
    assert _lines(figure.axes[0], "-") == [pytest.approx([100]), pytest.approx([80])]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(MODELS)
    plt.close(figure)
