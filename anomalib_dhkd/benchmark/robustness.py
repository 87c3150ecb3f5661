# SPDX-License-Identifier: Apache-2.0

"""Trained models tested again on changed images, and the tables of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anomalib.engine import Engine
from anomalib.metrics import Evaluator
from jsonargparse import ArgumentParser
from torchvision.transforms.v2 import Compose

from .changes import SETS, UNCHANGED, ChangeImages
from .predictions import PredictionRecorder, small

TITLES = {
    "image_AUROC": "image AUROC [%] on changed images",
    "pixel_AUROC": "pixel AUROC [%] on changed images",
    "pixel_AUPRO": "pixel AUPRO [%] on changed images",
    "false alarms": "False alarms on changed images: good ones above the threshold [%]",
    "misses": "Misses on changed images: defective ones below the threshold [%]",
}
"""What is measured, with the titles of its tables."""
ERRORS = ("false alarms", "misses")
"""What is worse when it is higher."""
FULL = 25
"""Loss in percentage points that has the full colour."""
NOTE = (
    "Changed images: the deeper the red, the more a model loses against the unchanged images, up to "
    f"{FULL} percentage points. Validation has set the threshold, on unchanged images. A set's own column is the mean "
    "of its changes."
)
PICTURE_SIZE = 128
"""Rows and columns of the images that are kept for the report."""


def parse_sets(section: dict[str, Any]) -> list[str]:
    """Check the section ``robustness`` of the configuration.

    Args:
        section (dict[str, Any]): ``sets``, a list of ``"line"`` and ``"ADShift"``.

    Returns:
        list[str]: Names of the changes.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--robustness.sets", type=list[Literal["line", "ADShift"]], required=True)
    chosen = parser.parse_object({"robustness": section}).robustness.sets
    return [name for key, changes in SETS.items() if key in chosen for name in changes]


def retest(model: Any, datamodule: Any, changes: list[str], folder: Path, accelerator: str) -> list[dict[str, Any]]:
    """Test a model on unchanged images and under each change, and keep how it sees the first defective image.

    Args:
        model (Any): A trained ``AnomalibModule``.
        datamodule (Any): Its ``AnomalibDataModule``.
        changes (list[str]): Names of the changes.
        folder (Path): Folder for ``strip.npz``: of ``n`` tests ``change``, ``image`` of shape ``(n, 3, 128, 128)`` and
            ``map`` of shape ``(n, 64, 64)``, both with values 0 to 255.
        accelerator (str): ``"cpu"`` or ``"cuda"``.

    Returns:
        list[dict[str, Any]]: For each test the change and what ``TITLES`` names, between 0 and 1.
    """
    model.evaluator = Evaluator(test_metrics=[each for each in model.evaluator.test_metrics if each.name in TITLES])
    own = datamodule.test_augmentations
    rows: list[dict[str, Any]] = []
    strip: dict[str, list[Any]] = {"change": [], "image": [], "map": []}
    for name in (UNCHANGED, *changes):
        # anomalib appends the model's resizing, so that the change comes before it.
        datamodule.test_augmentations = Compose([ChangeImages(name), *([own] if own else [])])
        recorder = PredictionRecorder()
        engine = Engine(
            callbacks=[recorder],
            default_root_dir=folder,
            accelerator=accelerator,
            devices=1,
            enable_progress_bar=False,
            logger=False,
        )
        (metrics,) = engine.test(model, datamodule)
        found, truth = (
            torch.cat([getattr(batch, field).flatten() for batch in recorder.batches]).bool().cpu()
            for field in ("pred_label", "gt_label")
        )
        rates = {
            "false alarms": found[~truth].float().mean().item(),
            "misses": 1 - found[truth].float().mean().item(),
        }
        rows.append({"change": name} | {key: metrics[key] for key in TITLES if key in metrics} | rates)
        first = int(truth.int().argmax())
        maps = torch.cat([batch.anomaly_map for batch in recorder.batches])
        strip["change"].append(name)
        strip["image"].append(small(datamodule.test_data[first].image, PICTURE_SIZE))
        strip["map"].append(small(maps[first : first + 1])[0])
    np.savez_compressed(folder / "strip.npz", allow_pickle=False, **{key: np.stack(strip[key]) for key in strip})
    return rows


def flatten_rows(robustness: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each model, data set, seed and change.

    Args:
        robustness (pd.DataFrame): Results of the jobs.

    Returns:
        pd.DataFrame: ``model``, ``data``, ``seed``, ``folder`` of the job, ``change`` and what ``TITLES`` names.
    """
    return pd.DataFrame(
        [
            {key: job[key] for key in ("model", "data", "seed", "folder")} | row
            for job in robustness.to_dict("records")
            if isinstance(job.get("rows"), list)  # not a number if the job failed
            for row in job["rows"]
        ]
    )


def percentages(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return a measure in per cent, the mean over the seeds.

    Args:
        rows (pd.DataFrame): See :func:`flatten_rows`.
        measure (str): A key of ``TITLES``.

    Returns:
        pd.DataFrame: A row for each data set and model, after one for each model's mean over the data sets if there are
            several; a column for each change and, after its last change, for each set.
    """
    table = 100 * rows.pivot_table(index=["data", "model"], columns="change", values=measure, sort=False)
    groups = table.groupby("model", sort=False)
    if (count := rows["data"].nunique()) > 1:
        # A model that failed somewhere has no mean that can be compared.
        means = groups.mean()[groups.size() == count]
        table = pd.concat([pd.concat({"mean": means}, names=["data"]), table])
    for key, changes in SETS.items():
        members = [name for name in changes if name in table]
        if members:
            table.insert(table.columns.get_loc(members[-1]) + 1, f"{key}, mean", table[members].mean(axis=1))
    return table


def mean_over_data(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return a measure of each model in per cent, the mean over data sets and seeds.

    Args:
        rows (pd.DataFrame): See :func:`flatten_rows`.
        measure (str): A key of ``TITLES``.

    Returns:
        pd.DataFrame: A row for each model that has all data sets; columns as :func:`percentages` has them.
    """
    table = percentages(rows, measure)
    if len(rows["data"].unique()) > 1:
        table = table[table.index.get_level_values("data") == "mean"]
    return table.droplevel("data")


def colours(table: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return the style (CSS) of each cell, which shows the loss against the unchanged images.

    Args:
        table (pd.DataFrame): See :func:`percentages`.
        measure (str): A key of ``TITLES``.

    Returns:
        pd.DataFrame: Of the same shape.
    """
    gain = table.sub(table[UNCHANGED], axis=0)
    share = (gain if measure in ERRORS else -gain).fillna(0).clip(0, FULL) / FULL
    return share.map("background-color: rgba(220, 60, 40, {:.2f})".format)


def robustness_tables(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, str]]:
    """Yield title, text and coloured HTML of a table for each measure.

    Args:
        rows (pd.DataFrame): See :func:`flatten_rows`.

    Yields:
        tuple[str, pd.DataFrame, str]: The table's text has columns for data, model and each change.
    """
    for measure, title in TITLES.items():
        if measure in rows and rows[measure].notna().any():
            numbers = percentages(rows, measure)
            text = numbers.map("{:.1f}".format).replace("nan", "").reset_index().rename_axis(columns=None)
            styles = colours(numbers, measure).reset_index(drop=True)
            styles = styles.reindex(columns=text.columns, fill_value="")
            styler = text.style.format(escape="html").hide(axis="index").apply(lambda _, css=styles: css, axis=None)
            yield title, text, styler.to_html(table_attributes='class="sortable changes"')
