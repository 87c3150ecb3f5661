# SPDX-License-Identifier: Apache-2.0

"""The report of a benchmark: ``results.csv``, ``results.json``, ``results.md``, and all in one page ``report.html``."""

import base64
import io
import json
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anomalib.utils.config import flatten_dict
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure
from PIL import Image

from .jobs import data_name, failed, model_name
from .work import MAP_SIZE, METRICS

COSTS = ["training [s]", "test [s]", "peak memory [GiB]", "peak GPU memory [GiB]", "epochs", "steps", "finished"]
LEVELS = {"image_AUROC": "detection", "pixel_AUROC": "localisation"}
"""Metrics that the paper's tables have, with the tables' names."""
REPORTED = "reported by the authors, not reproduced"
SLIPS = (
    "The authors' tables as printed. Means are computed from the cells, because some printed averages are not: RKD's "
    "detection cells average 98.47 (printed 98.2), SPADE's localisation cells 96.03 (97.5), RIAD's 93.94 (94.2), "
    "CutPaste's 95.60 (96.0), DHKD's 98.67 (98.6). The detection column of PaDiM is its pixel-level column, and two of "
    "CutPaste's cells equal RIAD's."
)


def flatten(trainings: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each training, without nested values.

    Args:
        trainings (pd.DataFrame): Results of the trainings.

    Returns:
        pd.DataFrame: ``model``, ``data``, ``seed``, metrics, costs, ``error``, versions and hardware, ``folder``.
    """
    rows = []
    for row in trainings.to_dict("records"):
        settings, surroundings = row.pop("settings"), row.pop("environment", None)
        name = {"model": model_name(settings), "data": data_name(settings), "seed": settings["seed"]}
        rows.append(name | {"error": None} | row | (surroundings if isinstance(surroundings, dict) else {}))
    return pd.DataFrame(rows).drop(columns="title")


def reported(metric: str, data: list[str]) -> pd.DataFrame:
    """Return the authors' figures in per cent for some categories.

    Args:
        metric (str): A key of ``LEVELS``.
        data (list[str]): Names of data; those that aren't categories of MVTec AD are left out.

    Returns:
        pd.DataFrame: One row for each method, with the mean of the columns before it and of all 15 categories.
    """
    source = pd.read_csv(resources.files(__package__) / "reported.csv")
    source = source[(source["table"] == LEVELS[metric]) & (source["category"] != "average")]
    table = source.pivot_table(index="method", columns="category", values="auroc_percent_as_printed", sort=False)
    shown = table[[name for name in data if name in table]]
    means = {"mean": shown.mean(axis=1) if len(shown.columns) == len(data) else np.nan, "all 15": table.mean(axis=1)}
    return shown.assign(**means).rename(index=lambda method: f"{method} ({REPORTED})")


def quality(results: pd.DataFrame, metric: str, with_reported: bool) -> pd.DataFrame:
    """Return a metric in per cent: mean over the seeds and, with several, their standard deviation.

    Args:
        results (pd.DataFrame): See :func:`flatten`.
        metric (str): Name of the metric.
        with_reported (bool): Whether the authors' figures follow, where there are any.

    Returns:
        pd.DataFrame: Text; one row for each model, one column for each data set and one for their mean.
    """
    seeds = 100 * results.pivot_table(index=["model", "seed"], columns="data", values=metric, sort=False)
    # A model that failed somewhere has no mean that can be compared.
    seeds["mean"] = seeds.mean(axis=1, skipna=False)
    groups = seeds.groupby("model", sort=False)
    table = groups.mean().map("{:.2f}".format)
    if len(results["seed"].unique()) > 1:
        table = table + " ± " + groups.std().map("{:.2f}".format)
    if with_reported and metric in LEVELS:
        table = pd.concat([table, reported(metric, list(seeds.columns[:-1])).map("{:.2f}".format)])
    return table.fillna("").replace("nan", "").rename_axis(index="model", columns=None).reset_index()


def differences(trainings: pd.DataFrame) -> pd.DataFrame:
    """Return the settings that aren't the same for all models.

    Args:
        trainings (pd.DataFrame): Results of the trainings.

    Returns:
        pd.DataFrame: Text; one row for each model.
    """
    rows = {}
    for row in trainings.to_dict("records"):
        settings = row["settings"]
        own = {**settings, **settings["model"]}
        for same in ("name", "model", "seed", "accelerator"):
            own.pop(same, None)
        # One data set stands for all.
        own["data"] = {key: value for key, value in settings["data"]["init_args"].items() if key != "category"}
        rows[model_name(settings)] = {key: str(value) for key, value in flatten_dict(own).items()}
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("default")
    return table.loc[:, (table != table.iloc[0]).any()].rename_axis("model").reset_index()


def inference_rows(latencies: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one row for each model and way of running it; none if the comparison failed."""
    return [row for rows in latencies.get("rows", []) if isinstance(rows, list) for row in rows]


def tables(trainings: pd.DataFrame, latencies: pd.DataFrame, with_reported: bool) -> dict[str, pd.DataFrame]:
    """Return all tables of the report by their titles; empty ones are left out."""
    results = flatten(trainings)
    good = results[results["error"].isna()]
    found: dict[str, pd.DataFrame] = {}
    if len(good):
        for metric in METRICS:
            found[f"{metric.replace('_', ' ')} [%]"] = quality(good, metric, with_reported)
        costs = good.groupby("model", sort=False)[[name for name in COSTS if good[name].notna().any()]].mean()
        found["Cost of training, mean over data and seeds"] = costs.map("{:.4g}".format).reset_index()
    inference = inference_rows(latencies)
    if inference:
        found["Inference side by side"] = pd.DataFrame(inference).map(
            lambda value: f"{value:.3g}" if isinstance(value, float) else value
        )
    found["What differs between the models"] = differences(trainings)
    surroundings = [value for value in trainings.get("environment", []) if isinstance(value, dict)]
    found["Where it was measured"] = pd.DataFrame(surroundings).drop_duplicates().T.rename_axis("").reset_index()
    errors = [
        {"job": row["title"], "error": row["error"]}
        for table in (trainings, latencies)
        for row in table.to_dict("records")
        if failed(row)
    ]
    found["Failed jobs"] = pd.DataFrame(errors)
    return {title: table for title, table in found.items() if len(table)}


def first_seed(trainings: pd.DataFrame) -> dict[str, dict[str, Path]]:
    """Return the folders of the finished trainings with the first seed, by data and model."""
    folders: dict[str, dict[str, Path]] = {}
    for row in trainings.to_dict("records"):
        if not failed(row):
            of_data = folders.setdefault(data_name(row["settings"]), {})
            of_data.setdefault(model_name(row["settings"]), Path(row["folder"]))
    return folders


def plot_curves(folders: dict[str, Path]) -> Figure:
    """Plot image ROC, pixel ROC and pixel PRO of the models on one data set."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    titles = {"image_ROC": "Image ROC", "pixel_ROC": "Pixel ROC", "pixel_PRO": "Pixel PRO"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for model, folder in folders.items():
            curves = np.load(folder / "curves.npz")
            if name in curves:
                axis.plot(*curves[name], label=model)
        axis.set(
            title=title,
            xlabel="false-positive rate",
            ylabel="region overlap" if "PRO" in name else "recall",
            ylim=(0, 1.02),
        )
    axes[0].legend(loc="lower right")
    figure.tight_layout()
    return figure


def plot_quality_and_latency(results: pd.DataFrame, latencies: pd.DataFrame) -> Figure:
    """Plot the models' mean AUROC over the latency of one image in OpenVINO, else in PyTorch."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    means = 100 * results.groupby("model", sort=False)[list(LEVELS)].mean()
    way = "OpenVINO f32" if (latencies["runs in"] == "OpenVINO f32").any() else "torch CPU"
    latency = latencies[latencies["runs in"] == way].set_index("model")["latency [ms]"]
    for axis, metric in zip(axes, LEVELS, strict=True):
        for model in means.index.intersection(latency.index):
            axis.plot(latency[model], means.loc[model, metric], "o")
            axis.annotate(model, (latency[model], means.loc[model, metric]), xytext=(5, 4), textcoords="offset points")
        axis.set(xlabel=f"latency of one image, {way} [ms]", ylabel=f"mean {metric.replace('_', ' ')} [%]")
        axis.set_xlim(left=0)
        axis.margins(x=0.2, y=0.2)
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
            (same,) = np.flatnonzero(predictions["path"] == str(path))
            axis.imshow(predictions["map"][same], cmap="jet", vmin=0, vmax=255)
            axis.set_xlabel(f"{predictions['auroc'][same]:.3f}", fontsize=8)
    for axis, title in zip(axes[0], ("image", "ground truth", *found), strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    return figure


def embed(figure: Figure) -> str:
    """Return a figure as a data URI and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(
    results_dir: Path,
    trainings: pd.DataFrame,
    latencies: pd.DataFrame,
    reported: bool = False,  # the configuration's name for it
) -> None:
    """Write the four files and say where they are.

    Args:
        results_dir (Path): Folder for them.
        trainings (pd.DataFrame): Results of the trainings.
        latencies (pd.DataFrame): Results of the comparison of inference.
        reported (bool): Whether to show the authors' figures beside the measured ones. Defaults to ``False``.
    """
    results = flatten(trainings)
    results.to_csv(results_dir / "results.csv", index=False)
    rows = json.loads(pd.concat([trainings, latencies]).to_json(orient="records"))
    (results_dir / "results.json").write_text(json.dumps(rows, indent=2))
    found = tables(trainings, latencies, reported)
    notes = [SLIPS] if reported else []
    parts = [f"## {title}\n\n{table.to_markdown(index=False, disable_numparse=True)}" for title, table in found.items()]
    (results_dir / "results.md").write_text("\n\n".join(["# Benchmark", *parts, *notes]) + "\n")

    plots = {}
    inference = inference_rows(latencies)
    if inference:
        figure = plot_quality_and_latency(results[results["error"].isna()], pd.DataFrame(inference))
        plots["Quality and latency"] = embed(figure)
    for data, folders in first_seed(trainings).items():
        plots[f"{data}: curves, first seed"] = embed(plot_curves(folders))
        plots[
            f"{data}: best, median and worst case of {next(iter(folders))}, with the pixel AUROC within the image"
        ] = embed(plot_cases(folders))
    environment = Environment(loader=PackageLoader("anomalib_dhkd.benchmark", "."), autoescape=select_autoescape())
    html = {title: table.to_html(index=False, border=0, classes="sortable") for title, table in found.items()}
    page = environment.get_template("report.html").render(tables=html, plots=plots, notes=notes)
    (results_dir / "report.html").write_text(page)
    print(found.get("image AUROC [%]", found.get("Failed jobs")).to_markdown(index=False, disable_numparse=True))  # type: ignore[union-attr]  # noqa: T201
    print(f"Report: {results_dir / 'report.html'}")  # noqa: T201
