# SPDX-License-Identifier: Apache-2.0

"""The documentation's pictures: how DHKD works, drawn from the model, and others, drawn from a benchmark's results."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from jsonargparse import auto_cli
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from anomalib_dhkd import Dhkd
from anomalib_dhkd.benchmark.plots import plot_quality_and_latency, plot_robustness
from anomalib_dhkd.benchmark.report import first_seed
from anomalib_dhkd.components.features import NEIGHBOURHOOD

STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "anomalib-dhkd", "text.parse_math": False}
"""Texts stay texts, and the same picture gives the same file."""
FROZEN, TRAINED, FITTED, TRAINING, PLAIN = (
    {"facecolor": face, "edgecolor": edge, "linestyle": line, "linewidth": 1.2}
    for face, edge, line in (
        ("#e4e8ee", "#56657a", "-"),
        ("#dbe8fa", "#1f5fa8", "-"),
        ("#dcf0df", "#2b7a3d", "-"),
        ("#fff0d9", "#a85b00", "--"),
        ("#ffffff", "#333333", "-"),
    )
)
"""Boxes, by what becomes of what is in them."""
TABLES = ("results.csv", "robustness.csv", "inference.csv")
"""Files of a benchmark's results that the pictures are drawn from."""
SCORES = {
    "mean": "mean of the map",
    "max": "highest value of the map",
    "topk": "highest hundredth of the map",
    "contrast": "highest hundredth of the map\nless a third of its mean",
}
"""How an image's score is read off its map."""


def draw_architecture(model: Dhkd) -> Figure:
    """Draw how an image goes through a model, with the model's own numbers.

    Args:
        model (Dhkd): A model with teacher, student and mixtures, trained or not.
    """
    network: Any = model.model
    arguments: Any = model.hparams
    pre_processor: Any = model.pre_processor
    image_size = pre_processor.transform.size
    with torch.no_grad():
        features = network.features(torch.zeros(1, 3, *image_size))
    maps = [
        f"{layer}: {feature.shape[1]} channels at {feature.shape[2]} x {feature.shape[3]} positions"
        for layer, feature in zip(network.layers, features, strict=True)
    ]
    pixels = f"{image_size[0]} x {image_size[1]} pixels"
    middle = 164 + 14 * len(maps)
    height = middle + 458
    figure = Figure(figsize=(380 / 72, height / 72))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 380), ylim=(height, 0))  # in points, from the left and the top
    axes.axis("off")

    _box(axes, (10, 10, 145, 42), PLAIN, f"Image\n{pixels}")
    _box(axes, (200, 10, 170, 42), TRAINING, f"Views in other light\n{model.views.number} of each training image")
    _box(axes, (10, 74, 360, 42), FROZEN, f"Frozen backbone\n{arguments['backbone']}")
    _box(axes, (10, 138, 360, middle - 138), FITTED, "\n".join(["Standardised features", *maps]))
    for left, title, layers, mixture in (
        (10, "as they are", network.layers[:-1], "mixture"),
        (197, f"averaged over {NEIGHBOURHOOD} x {NEIGHBOURHOOD}", network.layers[-1:], "averaged_mixture"),
    ):
        _arrow(axes, (left + 86, middle), (left + 86, middle + 22))
        _half(axes, (left, middle + 22), title, model, layers, mixture)
        _arrow(axes, (left + 86, middle + 260), (left + 86, middle + 282))
    calibration = "log of each distance, less its mean, by its deviation\nover the training images and their views"
    _box(axes, (10, middle + 282, 360, 56), FITTED, f"Calibration\n{calibration}")
    _box(axes, (10, middle + 360, 145, 56), PLAIN, f"Heat map\nsum with the weights above\n{pixels}")
    _box(axes, (200, middle + 360, 170, 56), PLAIN, f"Image score\n{SCORES[network.anomaly_map_generator.image_score]}")

    for start, end in (
        ((83, 52), (83, 74)),
        ((190, 116), (190, 138)),
        ((83, middle + 338), (83, middle + 360)),
        ((155, middle + 388), (200, middle + 388)),
    ):
        _arrow(axes, start, end)
    for start, end in (((155, 31), (200, 31)), ((285, 52), (285, 74))):
        _arrow(axes, start, end, TRAINING)
    for column, row, style, meaning in (
        (10, 0, FROZEN, "frozen"),
        (10, 1, FITTED, "fitted to training images"),
        (178, 0, TRAINED, f"trained, {arguments['train_steps']} steps, teacher first"),
        (178, 1, TRAINING, "in training only"),
    ):
        _box(axes, (column, middle + 428 + 15 * row, 16, 10), style)
        _text(axes, column + 22, middle + 433 + 15 * row, meaning, ha="left")
    return figure


def _half(axes: Axes, corner: tuple[float, float], title: str, model: Dhkd, layers: list[str], mixture: str) -> None:
    """Draw what sees the features in one form: teacher and student of some layers, and a mixture over all layers."""
    left, top = corner
    network: Any = model.model
    shares = network.anomaly_map_generator.weights
    _box(axes, (left, top, 173, 238), PLAIN)
    _text(axes, left + 86, top + 15, title, bold=True)
    if layers:
        students = dict(zip(network.layers, network.students, strict=True))
        widths = "width " + " and ".join(str(students[layer].enter.out_channels) for layer in layers)
        couplings, blocks = (
            f"{count} {name}{'s' * (count != 1)}"
            for name, count in (("coupling", model.hparams["flow_steps"]), ("block", model.hparams["student_blocks"]))
        )
        _box(axes, (left + 8, top + 30, 74, 92), TRAINED, f"Teacher\nflow of\n{couplings}\n{widths}")
        _box(axes, (left + 91, top + 30, 74, 20), TRAINING, f"Noise {network.noise_std:g}")
        _arrow(axes, (left + 128, top + 50), (left + 128, top + 66), TRAINING)
        _box(axes, (left + 91, top + 66, 74, 56), TRAINED, f"Student\n{blocks}\n{widths}")
        _text(axes, left + 8, top + 135, f"difference, {', '.join(layers)}", ha="left")
        _text(axes, left + 165, top + 135, _percent(sum(shares[layer] for layer in layers)), bold=True, ha="right")
    gaussians, channels = network.mixtures[mixture].means.shape
    text = f"Mixture\n{gaussians} local Gaussians\nover {channels} channels"
    _box(axes, (left + 8, top + 152, 157, 56), FITTED, text)
    _text(axes, left + 8, top + 222, "distance to nearest", ha="left")
    _text(axes, left + 165, top + 222, _percent(shares[mixture]), bold=True, ha="right")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _box(axes: Axes, place: tuple[float, float, float, float], style: dict[str, Any], text: str = "") -> None:
    """Draw a box at left, top, width and height; its text's first line is bold."""
    left, top, width, height = place
    axes.add_patch(FancyBboxPatch((left, top), width, height, "round,pad=0,rounding_size=4", **style))
    lines = text.split("\n")
    for number, line in enumerate(lines):
        y = top + height / 2 + 14 * (number - (len(lines) - 1) / 2)
        _text(axes, left + width / 2, y, line, bold=number == 0)


def _text(axes: Axes, x: float, y: float, line: str, bold: bool = False, ha: str = "center") -> None:
    """Write one line; several in one would not be centred in a font other than Matplotlib's."""
    style: dict[str, Any] = {"size": 11, "weight": "bold"} if bold else {"size": 9}
    axes.text(x, y, line, ha=ha, va="center", **style)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: dict[str, Any] = PLAIN) -> None:
    arrow = {"arrowstyle": "-|>", "color": style["edgecolor"], "linestyle": style["linestyle"], "linewidth": 1.2}
    axes.annotate("", end, start, arrowprops=arrow | {"shrinkA": 0, "shrinkB": 0})


def draw_gallery(results: pd.DataFrame) -> Figure:
    """Show what the first model finds on the first image of each kind of defect, on each data set in turn.

    Args:
        results (pd.DataFrame): Trainings without errors; see :func:`anomalib_dhkd.benchmark.report.flatten`.
    """
    found = []
    for data, folders in first_seed(results).items():
        predictions = np.load(next(iter(folders.values())) / "predictions.npz")
        first: dict[str, Any] = {}
        for index in np.flatnonzero(predictions["label"]):
            first.setdefault(Path(predictions["path"][index]).parent.name, index)
        found.append((data, predictions, sorted(first.items())))
    columns = max(len(defects) for *_, defects in found)
    figure = Figure(figsize=(2 * columns, 8.4), layout="constrained")
    axes = figure.subplots(4, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, name in zip(axes, ("image", "ground truth", "heat map", "region"), strict=True):
        row[0].set_ylabel(name, fontsize=14)
    for number, column in enumerate(axes.T):
        data, predictions, defects = found[number % len(found)]
        kind, index = defects[number % len(defects)]
        column[0].set_title(f"{kind}, {data}", fontsize=14)
        with Image.open(predictions["path"][index]) as image:
            pixels = np.asarray(image.convert("RGB"))
        place: Any = {"extent": (0, pixels.shape[1], pixels.shape[0], 0), "interpolation": "bilinear"}
        for axis in (column[0], *column[2:]):
            axis.imshow(pixels)
        column[1].imshow(predictions["mask"][index], cmap="gray", vmin=0, vmax=255, **place)
        heat_map = predictions["map"][index]
        column[2].imshow(heat_map, cmap="jet", vmin=0, vmax=255, alpha=0.5, **place)
        column[3].contour(heat_map, [127.5], colors="red", origin="upper", extent=place["extent"])  # the threshold
    return figure


def write_pictures(results: Path = Path("results/benchmark/quickstart"), folder: Path = Path("docs/pictures")) -> None:
    """Write ``architecture.svg``, and from a benchmark's results ``gallery.png`` and plots.

    Args:
        results (Path): Folder of a benchmark with the sections ``robustness`` and ``inference``. The gallery shows its
            test images.
        folder (Path): Folder for the pictures.

    Raises:
        FileNotFoundError: If ``results`` lacks a table; the architecture is drawn all the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        _save(draw_architecture(Dhkd()), folder / "architecture.svg")
        missing = [name for name in TABLES if not (results / name).is_file()]
        if missing:
            msg = (
                "results must be the folder of a finished benchmark with the sections robustness and inference, got "
                f"{results}, which lacks {', '.join(missing)}. `python -m anomalib_dhkd benchmark --config "
                "configs/benchmark/quickstart.yaml` makes results/benchmark/quickstart."
            )
            raise FileNotFoundError(msg)
        trainings, changed, latencies = (pd.read_csv(results / name) for name in TABLES)
        trainings = trainings[trainings["error"].isna()]
        draw_gallery(trainings).savefig(folder / "gallery.png")
        with Image.open(folder / "gallery.png") as gallery:
            smaller = gallery.convert("RGB").quantize()  # 256 colours take half the space
        smaller.save(folder / "gallery.png")
        _save(plot_robustness(changed), folder / "robustness.svg")
        _save(plot_quality_and_latency(trainings, latencies, changed), folder / "quality_latency.svg")


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    auto_cli(write_pictures)
