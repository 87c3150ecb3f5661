# SPDX-License-Identifier: Apache-2.0

"""Pages of reports for any browser: one file each, with all pictures in it, without a network."""

import base64
import io
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

BINS = 50
"""Bars of a histogram."""


def render(template: str, **values: Any) -> str:
    """Return a page; texts in it are escaped.

    Args:
        template (str): File of the template below this package.
        **values: What the template shows.
    """
    environment = Environment(loader=PackageLoader("anomalib_dhkd", "."), autoescape=select_autoescape())
    return environment.get_template(template).render(**values)


def embed(picture: Figure | Image.Image) -> str:
    """Return a picture as a data URI, and close it if it is a figure."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=100)
        plt.close(picture)
        kind = "png"
    else:
        picture.convert("RGB").save(buffer, format="JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def wide_figure(height: float) -> Figure:
    """Return a figure over the width of a page, of a height in inches, with room for labels.

    Matplotlib's layouts would find the room themselves, by drawing everything twice.
    """
    figure = Figure(figsize=(11, height))
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.56 / height, top=1 - 0.35 / height, wspace=0.25)
    return figure


def plot_curves(curves: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Plot image ROC, pixel ROC and pixel PRO, those that there are.

    Args:
        curves (dict[str, dict[str, np.ndarray]]): What :func:`~anomalib_dhkd.metrics.curves` returns, by its label.
    """
    figure = wide_figure(3.4)
    axes = figure.subplots(1, 3)
    titles = {"image_ROC": "Image ROC", "pixel_ROC": "Pixel ROC", "pixel_PRO": "Pixel PRO"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for label, found in curves.items():
            if name in found:
                axis.plot(*found[name], label=label)
        axis.set(
            title=title,
            xlabel="false-positive rate",
            ylabel="region overlap" if "PRO" in name else "recall",
            ylim=(0, 1.02),
        )
    axes[0].legend(loc="lower right")
    return figure


def plot_scores(axes: Axes, groups: dict[str, np.ndarray], lines: dict[str, float]) -> None:
    """Plot a histogram of scores.

    Args:
        axes (Axes): Where to plot.
        groups (dict[str, np.ndarray]): Scores of shape ``(N,)`` by their label, good ones first.
        lines (dict[str, float]): Single scores by their label, the threshold first.
    """
    shown = np.concatenate([*groups.values(), list(lines.values())])
    limits = (0.0, 1.0) if shown.min() >= 0 and shown.max() <= 1 else (float(shown.min()), float(shown.max()))
    for (label, scores), colour in zip(groups.items(), ("tab:green", "tab:red"), strict=False):
        axes.hist(scores, bins=BINS, range=limits, color=colour, alpha=0.6, label=label)
    for (label, score), (colour, style) in zip(lines.items(), (("black", "--"), ("tab:blue", "-")), strict=False):
        axes.axvline(score, color=colour, linestyle=style, label=label)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
