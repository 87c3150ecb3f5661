# SPDX-License-Identifier: Apache-2.0

"""What the page of a training says: facts, results, pictures, and what to type next."""

import math
import platform
import shlex
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from matplotlib.figure import Figure
from torch.nn import functional as F  # noqa: N812

from .data_check import check_data, samples_of
from .metrics import curves
from .pages import embed, plot_curves, plot_scores, wide_figure
from .visualizer import PathVisualizer

PACKAGES = ("anomalib-dhkd", "anomalib", "lightning", "timm", "torch")
MAPS = 250
"""Images at most, about, that the curves of pixels are of."""
MAP_SIZE = 128
"""Rows and columns of the positions in each of them."""


class Evaluated:
    """What is kept of validation or test images.

    Attributes:
        paths (list[str]): Their files; empty where these aren't known.
        scores (list[float]): Their scores.
        labels (list[bool]): Whether they are defective; empty where that isn't known.
        maps (list[ImageBatch]): Some of the maps and masks at few positions, for curves of pixels.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.scores: list[float] = []
        self.labels: list[bool] = []
        self.maps: list[ImageBatch] = []

    def add(self, batch: Any, batches: float) -> None:
        """Add a batch with its predictions, one of so many."""
        every = math.ceil(len(batch.pred_score) * batches / MAPS) if math.isfinite(batches) else MAPS
        chosen = slice(-len(self.scores) % every, None, every)
        self.scores += batch.pred_score.flatten().tolist()
        self.paths += batch.image_path or []
        self.labels += [] if batch.gt_label is None else batch.gt_label.bool().flatten().tolist()
        if batch.gt_mask is not None and batch.anomaly_map is not None and len(batch.pred_score[chosen]):
            maps, masks = (
                F.interpolate(values[chosen].reshape(-1, 1, *values.shape[-2:]).float(), (MAP_SIZE, MAP_SIZE))[
                    :, 0
                ].cpu()
                for values in (batch.anomaly_map, batch.gt_mask)
            )
            image = torch.zeros(len(maps), 3, 1, 1)
            self.maps.append(ImageBatch(image=image, anomaly_map=maps, gt_mask=masks.bool()))

    def curves(self) -> dict[str, np.ndarray]:
        """Return the curves: those of images of all of them, those of pixels of some."""
        found = curves(self.maps) if self.maps else {}
        if self.labels:
            scores, labels = torch.tensor(self.scores), torch.tensor(self.labels)
            found |= curves([ImageBatch(image=torch.zeros(len(scores), 3, 1, 1), pred_score=scores, gt_label=labels)])
        return found


def facts_of(trainer: Any, model: Any, folder: Path) -> dict[str, Any]:
    """Return what the page says of a training, apart from its results.

    Args:
        trainer (Trainer): Trainer after ``fit``.
        model (Dhkd): The trained model.
        folder (Path): The run's folder.

    Returns:
        dict[str, Any]: Texts and tables by their names in the template.
    """
    datamodule = trainer.datamodule
    found = check_data(datamodule)
    checkpoint = trainer.checkpoint_callback.best_model_path
    size = model.input_size
    names = ("train_batch_size", "eval_batch_size", "num_workers", "val_split_mode", "test_split_mode", "seed")
    data = {name: getattr(datamodule, name) for name in names if hasattr(datamodule, name)}
    settings = {
        "model": dict(model.hparams),
        "data": {name: getattr(value, "value", value) for name, value in data.items()},
        "trainer": {
            "steps": f"{model.budget.teacher_steps} of the teacher, {model.budget.student_steps} of the student",
            "epochs": trainer.current_epoch,
            "precision": trainer.precision,
            "devices": f"{trainer.world_size} x {trainer.strategy.root_device.type}",
            "seed": model.seed,
        },
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    reduced = max(found.size[0] / size[1], found.size[1] / size[0]) if found.size and size else None
    return {
        "name": model.training_data or "images of your own",
        "root": getattr(datamodule, "root", None),
        "date": datetime.now(tz=timezone.utc).astimezone().isoformat(" ", "minutes"),
        "version": version("anomalib-dhkd"),
        "platform": platform.platform(terse=True),
        "found": found,
        "size": size,
        "reduced": reduced,
        "views": model.views.number,
        "settings": settings,
        "resumed": model.resumed_from,
        "devices": trainer.world_size,
        "checkpoint": checkpoint,
        "commands": commands(checkpoint, folder) if checkpoint else {},
    }


def commands(checkpoint: str, folder: Path) -> dict[str, str]:
    """Return what to type next, by what it is for.

    Args:
        checkpoint (str): File of the trained model.
        folder (Path): The run's folder.

    Returns:
        dict[str, str]: Commands, in which only ``IMAGES`` and ``IMAGE`` are to be replaced.
    """
    given, exported = shlex.quote(checkpoint), shlex.quote(str(folder / "weights" / "openvino" / "model.xml"))
    model = "--model anomalib_dhkd.Dhkd"
    export = f"--export_type openvino --export_root {shlex.quote(str(folder))}"
    return {
        "Look at images": f"anomalib predict {model} --ckpt_path {given} --data IMAGES",
        "See why an image has its score": f"python -m anomalib_dhkd explain --ckpt_path {given} --data IMAGE",
        "Export for OpenVINO": f"anomalib export {model} --ckpt_path {given} {export}",
        "Run the exported model on a folder": f"python -m anomalib_dhkd watch --model {exported} --source IMAGES "
        "--output verdicts.jsonl",
    }


def results_of(trainer: Any, model: Any, stage: str, evaluated: Evaluated) -> dict[str, Any]:
    """Return what the page says of the results.

    Args:
        trainer (Trainer): Trainer after ``fit`` or ``test``.
        model (Dhkd): The trained model.
        stage (str): ``"fit"`` or ``"test"``.
        evaluated (Evaluated): Validation images after ``fit``, test images after ``test``.

    Returns:
        dict[str, Any]: Texts, tables and pictures by their names in the template.
    """
    post_processor: Any = model.post_processor if isinstance(model.post_processor, PostProcessor) else None
    scores, labels = torch.tensor(evaluated.scores), np.array(evaluated.labels, dtype=bool)
    if stage == "fit" and post_processor and len(scores):
        scores = post_processor(InferenceBatch(pred_score=scores.to(post_processor.image_min))).pred_score.cpu()
    values = scores.float().numpy()
    threshold = None
    if post_processor and post_processor.enable_thresholding:
        threshold = float(post_processor.normalized_image_threshold)
    known = len(labels) == len(values) > 0
    groups = {"good": values[~labels], "defective": values[labels]} if known else {"images": values}
    groups = {f"{len(group)} {name}": group for name, group in groups.items() if len(group)}
    rates: dict[str, tuple[int, int]] = {}
    if known and threshold is not None:
        rates["false alarms"] = int((values[~labels] > threshold).sum()), int((~labels).sum())
        rates["missed defects"] = int((values[labels] <= threshold).sum()), int(labels.sum())
    found = evaluated.curves()
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()} if stage == "test" else {}
    mode = getattr(getattr(trainer.datamodule, "val_split_mode", None), "value", None)
    return {
        "stage": {"fit": "validation", "test": "test"}[stage],
        "metrics": metrics,
        "threshold": threshold,
        "false_alarm_rate": getattr(post_processor, "false_alarm_rate", None),
        "seen": stage == "fit" or mode == "same_as_test",
        "rates": {name: rate for name, rate in rates.items() if rate[1]},
        "histogram": embed(_histogram(groups, threshold)) if groups else "",
        "curves": embed(plot_curves({"this model": found})) if found else "",
        "cases": cases(trainer.datamodule, model, stage, evaluated.paths, values, labels if known else None),
    }


def _histogram(groups: dict[str, np.ndarray], threshold: float | None) -> Figure:
    figure = wide_figure(2.8)
    axes = figure.subplots()
    plot_scores(axes, groups, {} if threshold is None else {f"threshold: {threshold:.3f}": threshold})
    axes.set(xlabel="score", ylabel="images")
    axes.legend()
    return figure


@torch.no_grad()
def cases(
    datamodule: Any, model: Any, stage: str, paths: list[str], scores: np.ndarray, labels: np.ndarray | None
) -> list[dict[str, Any]]:
    """Return the pictures of the images with the best, the median and the worst score.

    Args:
        datamodule (AnomalibDataModule | None): Where the images come from.
        model (Dhkd): The trained model.
        stage (str): ``"fit"`` for validation, ``"test"`` for test images.
        paths (list[str]): Their files.
        scores (np.ndarray): Their scores.
        labels (np.ndarray | None): Whether they are defective.

    Returns:
        list[dict[str, Any]]: ``title``, ``path``, ``score`` and ``picture`` of each; none where there are no files.
    """
    split = "val" if stage == "fit" else "test"
    samples = samples_of(datamodule, split)
    if not len(samples) or len(paths) != len(scores):
        return []
    everything = np.arange(len(scores))
    groups = {"": everything} if labels is None else {"good": everything[~labels], "defective": everything[labels]}
    rows: dict[str, dict[str, Any]] = {}
    visualizer: Any = PathVisualizer()
    training = model.training
    model.eval()
    for group, members in groups.items():
        ordered = members[np.argsort(scores[members])]  # of good images, the lowest score is the best
        ordered = ordered[::-1] if group == "defective" else ordered
        for place, index in {"best": 0, "median": len(ordered) // 2, "worst": -1}.items():
            path = paths[ordered[index]] if len(ordered) else None
            if path is None or path in rows:
                continue
            item = getattr(datamodule, f"{split}_data")[list(samples.image_path).index(path)]
            found = model(item.image[None].to(model.device))._asdict()
            item.update(**{name: value[0].cpu() for name, value in found.items() if value is not None})
            rows[path] = {
                "title": f"{group}, {place}" if group else place,
                "path": path,
                "score": float(scores[ordered[index]]),
                "picture": embed(visualizer.visualize(item)),
            }
    model.train(training)
    return list(rows.values())
