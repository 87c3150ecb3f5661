# SPDX-License-Identifier: Apache-2.0

"""Pages and the pictures in them."""

import base64
import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from anomalib_dhkd.pages import embed, plot_curves, plot_scores, render


@pytest.mark.parametrize(("picture", "kind"), [(Figure((1, 2)), "PNG"), (Image.new("RGBA", (100, 200)), "JPEG")])
def test_pictures_are_in_the_page(picture: Figure | Image.Image, kind: str) -> None:
    head, content = embed(picture).split(",")
    assert head == f"data:image/{kind.lower()};base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (image.format, image.size) == (kind, (100, 200))


def test_texts_are_escaped() -> None:
    page = render("benchmark/report.html", tables={"<b>x": "<table></table>"}, plots={}, notes=["1 < 2"])
    assert "<h2>&lt;b&gt;x</h2>" in page
    assert "<table></table>" in page
    assert "<p>1 &lt; 2</p>" in page


@pytest.mark.parametrize("groups", [{}, {"good": np.array([0.1, 0.2, 0.2])}, {"good": np.ones(3), "bad": -np.ones(4)}])
def test_plot_of_scores(groups: dict[str, np.ndarray]) -> None:
    axes = Figure().subplots()
    plot_scores(axes, groups, {"threshold": 0.5, "this": 0.7})
    assert sum(bar.get_height() for bar in axes.patches) == sum(map(len, groups.values()))
    assert [line.get_xdata()[0] for line in axes.lines] == [0.5, 0.7]
    assert [text.get_text() for text in axes.legend().get_texts()] == [*groups, "threshold", "this"]


def test_plot_of_curves_that_there_are() -> None:
    curve = np.stack([np.linspace(0, 1, 5), np.linspace(0, 1, 5)])
    figure = plot_curves({"one": {"image_ROC": curve, "pixel_ROC": curve}, "other": {"image_ROC": curve}})
    assert [len(axes.lines) for axes in figure.axes] == [2, 1, 0]
