# SPDX-License-Identifier: Apache-2.0

"""The report of a benchmark: ``results.csv``, ``results.json``, ``results.md``, and all in one page ``report.html``.

The tests on changed images, if there are any, are in ``robustness.csv`` too, and the comparison of inference in
``inference.csv``.
"""

import json
from importlib import resources
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from anomalib.utils.config import flatten_dict

from anomalib_dhkd.pages import embed, plot_curves, render

from .jobs import data_name, failed
from .parity import NOTE as PARITY_NOTE
from .plots import growth, plot_cases, plot_growth, plot_quality_and_latency, plot_robustness, plot_strip
from .robustness import NOTE, flatten_rows, robustness_tables
from .work import METRICS

COSTS = ["training [s]", "test [s]", "peak memory [GiB]", "peak GPU memory [GiB]", "epochs", "steps", "finished"]
LEVELS = {"image_AUROC": "detection", "pixel_AUROC": "localisation"}
"""Metrics that the paper's tables have, with the tables' names."""
PARITY = "Exported files against anomalib's Engine"
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
        pd.DataFrame: ``model``, ``data``, ``seed``, metrics, costs, ``error``, versions and hardware, ``folder``;
            ``kind`` is the model without the sizes that a grid gives it.
    """
    rows = []
    for row in trainings.to_dict("records"):
        settings, surroundings = row.pop("settings"), row.pop("environment", None)
        name = {
            "model": settings["name"],
            "kind": settings["model"]["name"],
            "data": data_name(settings),
            "seed": settings["seed"],
            "image size": settings["image_size"],
        }
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
        rows[settings["name"]] = {key: str(value) for key, value in flatten_dict(own).items()}
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("default")
    return table.loc[:, (table != table.iloc[0]).any()].rename_axis("model").reset_index()


def inference_table(latencies: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return one part of the comparison of inference; empty if the comparison failed or there was none."""
    return pd.DataFrame([row for rows in latencies.get(name, []) if isinstance(rows, list) for row in rows])


def tables(
    trainings: pd.DataFrame,
    changed: pd.DataFrame,
    exported: pd.DataFrame,
    latencies: pd.DataFrame,
    with_reported: bool,
) -> dict[str, pd.DataFrame]:
    """Return all tables of the report but those of changed images by their titles; empty ones are left out."""
    results = flatten(trainings)
    good = results[results["error"].isna()]
    found: dict[str, pd.DataFrame] = {}
    if len(good):
        for metric in METRICS:
            found[f"{metric.replace('_', ' ')} [%]"] = quality(good, metric, with_reported)
        if shifts := [name for name in good if name.endswith("_shift")]:
            numbers = good.groupby("model", sort=False)[shifts].mean().dropna(how="all").map("{:.2f}".format)
            found["Shift of the responses on anomalies"] = numbers.replace("nan", "").reset_index()
        costs = good.groupby("model", sort=False)[[name for name in COSTS if good[name].notna().any()]].mean()
        costs.insert(1, "times first", costs["training [s]"] / costs["training [s]"].iloc[0])
        found["Cost of training, mean over data and seeds"] = costs.map("{:.4g}".format).reset_index()
    parity = flatten_rows(exported)
    if len(parity):
        numbers = parity.drop(columns=["seed", "folder"])
        found[PARITY] = numbers.map(lambda value: f"{value:.3g}" if isinstance(value, float) else value)
    for title, name in (
        ("Inference side by side", "rows"),
        ("Not exported, or not loaded by OpenVINO", "left_out"),
        ("Time of one image by operation", "operations"),
    ):
        numbers = inference_table(latencies, name)
        found[title] = numbers.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
        found[title] = found[title].replace("nan", "")
    found["What differs between the models"] = differences(trainings)
    surroundings = [value for value in trainings.get("environment", []) if isinstance(value, dict)]
    found["Where it was measured"] = pd.DataFrame(surroundings).drop_duplicates().T.rename_axis("").reset_index()
    errors = [
        {"job": row["title"], "error": row["error"]}
        for table in (trainings, changed, exported, latencies)
        for row in table.to_dict("records")
        if failed(row)
    ]
    found["Failed jobs"] = pd.DataFrame(errors)
    return {title: table for title, table in found.items() if len(table)}


def first_seed(results: pd.DataFrame) -> dict[str, dict[str, Path]]:
    """Return the folders of the jobs with the first seed, by data and model.

    Args:
        results (pd.DataFrame): Finished jobs, with ``data``, ``model`` and ``folder``.

    Returns:
        dict[str, dict[str, Path]]: Folder of each model of each data set.
    """
    folders: dict[str, dict[str, Path]] = {}
    for row in results.to_dict("records"):
        folders.setdefault(row["data"], {}).setdefault(row["model"], Path(row["folder"]))
    return folders


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown, whatever its texts contain."""
    text = table.rename(columns=str).map(str)
    text.columns = text.columns.str.replace("|", r"\|", regex=False)
    return text.replace(r"\|", r"\\|", regex=True).to_markdown(index=False, disable_numparse=True)


def write_report(
    results_dir: Path,
    trainings: pd.DataFrame,
    changed: pd.DataFrame,
    exported: pd.DataFrame,
    latencies: pd.DataFrame,
    reported: bool = False,  # the configuration's name for it
) -> None:
    """Write the files and say where they are.

    Args:
        results_dir (Path): Folder for them.
        trainings (pd.DataFrame): Results of the trainings.
        changed (pd.DataFrame): Results of the tests on changed images.
        exported (pd.DataFrame): Results of the tests of exported files.
        latencies (pd.DataFrame): Results of the comparison of inference.
        reported (bool): Whether to show the authors' figures beside the measured ones. Defaults to ``False``.
    """
    results = flatten(trainings)
    results.to_csv(results_dir / "results.csv", index=False)
    rows = json.loads(pd.concat([trainings, changed, exported, latencies]).to_json(orient="records"))
    (results_dir / "results.json").write_text(json.dumps(rows, indent=2))
    found = tables(trainings, changed, exported, latencies, reported)
    html = {title: table.to_html(index=False, border=0, classes="sortable") for title, table in found.items()}
    notes = [SLIPS] if reported else []
    changes = flatten_rows(changed)
    if len(changes):
        changes.to_csv(results_dir / "robustness.csv", index=False)
        notes.append(NOTE)
    if PARITY in found:
        notes.append(PARITY_NOTE)
    for title, table, coloured in robustness_tables(changes):
        found[title], html[title] = table, coloured
    parts = [f"## {title}\n\n{markdown(table)}" for title, table in found.items()]
    (results_dir / "results.md").write_text("\n\n".join(["# Benchmark", *parts, *notes]) + "\n")

    plt.rcParams["text.parse_math"] = False  # a dollar sign in a name is no formula
    plots = {}
    good = results[results["error"].isna()]
    inference = inference_table(latencies, "rows")
    if len(inference):
        inference.to_csv(results_dir / "inference.csv", index=False)
        plots["Quality and latency"] = embed(plot_quality_and_latency(good, inference, changes))
    if len(changes):
        plots["Image AUROC under each change, mean over data and seeds"] = embed(plot_robustness(changes))
    grown = growth(good) if len(good) else []
    if grown:
        plots["Growth of training with images and pixels"] = embed(plot_growth(grown))
    for data, folders in first_seed(good).items():
        plots[f"{data}: curves, first seed"] = embed(
            plot_curves({model: dict(np.load(folder / "curves.npz")) for model, folder in folders.items()})
        )
        title = f"{data}: best, median and worst case of {next(iter(folders))}, with the pixel AUROC within the image"
        plots[title] = embed(plot_cases(folders))
    for data, folders in first_seed(changes).items():
        title = f"{data}: first defective image under each change, heat maps yellow to red above the threshold"
        plots[title] = embed(plot_strip(folders))
    page = render("benchmark/report.html", tables=html, plots=plots, notes=notes)
    (results_dir / "report.html").write_text(page)
    print(markdown(found.get("image AUROC [%]", found.get("Failed jobs"))))  # noqa: T201
    print(f"Report: {results_dir / 'report.html'}")  # noqa: T201
