# SPDX-License-Identifier: Apache-2.0

"""The pictures in the report of a benchmark."""

from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from .changes import UNCHANGED
from .predictions import MAP_SIZE
from .robustness import mean_over_data

AXES = ("image_AUROC", "pixel_AUROC")
"""Metrics that are plotted over the latency."""
COLOURS = [colour for start in (0, 1) for colour in mpl.color_sequences["tab20"][start::2]]
"""Of the models in their order, the light ones last."""
MARKERS = "osD"
"""Of the images as they are and of the sets of changes."""


def plot_quality_and_latency(results: pd.DataFrame, latencies: pd.DataFrame, changed: pd.DataFrame) -> Figure:
    """Plot the models' mean AUROC over the latency of one image in OpenVINO, else in PyTorch.

    Args:
        results (pd.DataFrame): Trainings without errors, with ``model`` and the metrics of ``AXES``.
        latencies (pd.DataFrame): ``model``, ``runs in`` and ``latency [ms]``.
        changed (pd.DataFrame): Tests on changed images, see :func:`~.robustness.flatten_rows`; a line leads down to the
            mean of each set of changes. Empty if there are none.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), layout="constrained")
    means = 100 * results.groupby("model", sort=False)[list(AXES)].mean()
    way = "OpenVINO f32" if (latencies["runs in"] == "OpenVINO f32").any() else "torch CPU"
    latency = latencies[latencies["runs in"] == way].set_index("model")["latency [ms]"]
    models = means.index.intersection(latency.index, sort=False)
    for axis, metric in zip(axes, AXES, strict=True):
        sets = mean_over_data(changed, metric).filter(like=", mean") if metric in changed else pd.DataFrame()
        sets = sets.reindex(models)
        # The first model is on top of others that are as fast.
        for order, (model, colour) in enumerate(zip(models, cycle(COLOURS), strict=False)):
            values = [means.loc[model, metric], *sets.loc[model]]
            style: Any = {"color": colour, "zorder": 3 - order / len(models)}
            axis.plot([latency[model]] * len(values), values, "-", **style)
            for value, marker in zip(values, MARKERS, strict=False):
                axis.plot(latency[model], value, marker, markeredgecolor="white", markersize=8, **style)
        axis.set(xlabel=f"latency of one image, {way} [ms]", ylabel=f"mean {metric.replace('_', ' ')} [%]")
        axis.margins(x=0.2, y=0.1)
        axis.set_xlim(left=0)
        axis.grid(color="0.9")
    legend: Any = {"ncols": 4, "frameon": False}
    shown = [Line2D([], [], color=colour, linewidth=4) for _, colour in zip(models, cycle(COLOURS), strict=False)]
    figure.legend(shown, list(models), loc="outside upper center", **legend)
    if len(sets.columns):
        names = [UNCHANGED, *sets.columns]
        shown = [Line2D([], [], color="0.4", linestyle="", marker=marker) for marker in MARKERS[: len(names)]]
        figure.legend(shown, names, loc="outside lower center", **legend)
    return figure


def plot_robustness(changed: pd.DataFrame) -> Figure:
    """Plot the models' image AUROC as the images are and under each change, mean over data sets and seeds.

    Args:
        changed (pd.DataFrame): See :func:`~.robustness.flatten_rows`.
    """
    means = mean_over_data(changed, "image_AUROC")
    figure, axis = plt.subplots(figsize=(6.4, 1.2 + 0.27 * len(means.columns)), layout="constrained")
    for (model, values), colour, marker in zip(means.iterrows(), cycle(COLOURS), cycle("osD^vPX"), strict=False):
        axis.plot(values, range(len(values)), marker=marker, color=colour, linewidth=1, markersize=5, label=model)
    axis.set_yticks(range(len(means.columns)), means.columns)
    for label, name in zip(axis.get_yticklabels(), means.columns, strict=True):
        if name.endswith(", mean"):
            label.set_fontweight("bold")
            axis.axhspan(label.get_position()[1] - 0.5, label.get_position()[1] + 0.5, color="0.93", linewidth=0)
    axis.set(xlabel="image AUROC [%]", ylim=(len(means.columns) - 0.5, -0.5))
    axis.grid(color="0.9")
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def growth(results: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Find what was trained on several numbers of images or image sizes, all else the same.

    Args:
        results (pd.DataFrame): See :func:`flatten`, without errors.

    Returns:
        list[tuple[str, str, pd.DataFrame]]: Column that varies, name of what doesn't, and the rows.
    """
    results = results.assign(pixels=results["image size"].astype(float) ** 2)
    found = []
    for varied, fixed, unit in (("training images", "image size", "px"), ("pixels", "training images", "images")):
        for (kind, data, value), rows in results.groupby(["kind", "data", fixed], sort=False):
            if len(rows[varied].unique()) > 1:
                found.append((varied, f"{kind}, {data}, {value:g} {unit}", rows.sort_values(varied)))
    return found


def plot_growth(found: list[tuple[str, str, pd.DataFrame]]) -> Figure:
    """Plot time and memory of training over images and over pixels, each with its straight line (least squares)."""
    columns = list(dict.fromkeys(varied for varied, *_ in found))
    figure, axes = plt.subplots(2, len(columns), figsize=(5.5 * len(columns), 6), squeeze=False, sharex="col")
    for varied, label, rows in found:
        for axis, value in zip(axes[:, columns.index(varied)], ("training [s]", "peak memory [GiB]"), strict=True):
            x, y = rows[varied].astype(float), rows[value].astype(float)
            (points,) = axis.plot(x, y, "o", label=label)
            axis.plot(x, np.polyval(np.polyfit(x, y, 1), x), "-", linewidth=1, color=points.get_color())
            axis.set(xlabel=varied, ylabel=value, ylim=(0, None))
    for axis in axes[0]:
        axis.legend(fontsize=7)
    figure.tight_layout()
    return figure


def plot_cases(folders: dict[str, Path]) -> Figure:
    """Show image, ground truth and every model's heat map of three anomalous images of one data set.

    They are those that the first model finds best, in the middle and worst, by the pixel AUROC within the image.
    """
    found = {model: np.load(folder / "predictions.npz") for model, folder in folders.items()}
    first = next(iter(found.values()))
    anomalous = np.flatnonzero(~np.isnan(first["auroc"]))
    ordered = anomalous[np.argsort(first["auroc"][anomalous])]
    cases = {"best": ordered[-1], "median": ordered[len(ordered) // 2], "worst": ordered[0]} if len(ordered) else {}
    columns = 2 + len(found)
    figure, axes = plt.subplots(
        max(1, len(cases)), columns, figsize=(1.7 * columns, 1.8 * max(1, len(cases))), squeeze=False
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, (case, index) in zip(axes, cases.items(), strict=False):
        path = Path(str(first["path"][index]))
        with Image.open(path) as image:
            row[0].imshow(image.convert("RGB").resize((4 * MAP_SIZE, 4 * MAP_SIZE)))
        row[0].set_ylabel(f"{case}\n{path.parent.name}/{path.stem}", fontsize=8)
        row[1].imshow(first["mask"][index], cmap="gray", vmin=0, vmax=255)
        for axis, predictions in zip(row[2:], found.values(), strict=True):
            # Models may read the images in another order.
            same = np.argmax(predictions["path"] == str(path))
            axis.imshow(predictions["map"][same], cmap="jet", vmin=0, vmax=255)
            axis.set_xlabel(f"{predictions['auroc'][same]:.3f}", fontsize=8)
    for axis, title in zip(axes[0], ("image", "ground truth", *found), strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure


def plot_strip(folders: dict[str, Path]) -> Figure:
    """Show one image of one data set under each change, and every model's heat map of it."""
    found = {model: np.load(folder / "strip.npz") for model, folder in folders.items()}
    first = next(iter(found.values()))
    changes = first["change"]
    figure, axes = plt.subplots(1 + len(found), len(changes), figsize=(1 + len(changes), 1.1 * (2 + len(found))))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for axis, change, image in zip(axes[0], changes, first["image"], strict=True):
        axis.set_title(fill(change, 12), fontsize=8)
        axis.imshow(image.transpose(1, 2, 0))
    for row, (model, strip) in zip(axes[1:], found.items(), strict=True):
        row[0].set_ylabel(fill(model, 14), fontsize=8)
        for axis, heat_map in zip(row, strip["map"], strict=True):
            axis.imshow(heat_map, cmap="jet", vmin=0, vmax=255)
    figure.tight_layout(pad=0.3)
    return figure
