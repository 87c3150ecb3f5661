# SPDX-License-Identifier: Apache-2.0

"""A look inside: what the parts of a trained model make of an image. The subcommand ``explain`` shows it."""

import pickle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.data.utils.image import is_image_file
from anomalib.post_processing import PostProcessor
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA

from .lightning_model import Dhkd
from .pages import plot_scores
from .resume import UnfinishedError
from .visualizer import PathVisualizer

DPI = 100
"""Pixels of an inch of the figure."""
CLIPPED = 2
"""Per cent of the positions, at either end, that a colour is at its lowest or highest."""


class InsideVisualizer(PathVisualizer):
    """anomalib's picture of an image, and below it what the model's parts say.

    - Fine and coarse part of the map, in the map's own colours: what the features as they are say, and what averaged
      ones say. The map is their mean.
    - The image's score beside the threshold, on a histogram of the scores of good validation images.
    - What teacher and student answer at each layer: their first three principal components as red, green and blue.
      They are taken from both together, so where the colours differ, the answers do.

    ``--model.visualizer anomalib_dhkd.InsideVisualizer`` has `predict` and `test` write such pictures.

    Args:
        **kwargs: Arguments of :class:`anomalib.visualization.ImageVisualizer`.

    Attributes:
        model (Dhkd | None): Model whose predictions are shown, which a trainer sets.
    """

    folder = "explanations"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Note whose predictions are shown."""
        del trainer, stage  # Unused arguments.
        self.model = pl_module

    def visualize(self, predictions: Any) -> Any:
        """Show predictions.

        Args:
            predictions (ImageItem | ImageBatch): An image with its predictions, as the model was given it, or several.

        Returns:
            Image.Image | list[Image.Image]: A picture, or one of each if there are several.

        Raises:
            ValueError: If there is no model yet.
        """
        if self.model is None:
            msg = "model must be set to the Dhkd whose predictions are shown before visualize is called, got None."
            raise ValueError(msg)
        if isinstance(predictions, ImageBatch):
            pictures = [self.visualize(item) for item in predictions]
            return pictures[0] if len(pictures) == 1 else pictures
        above: Any = super().visualize(predictions)
        width, height = above.width, 2 * self.field_size[1]
        with mpl.rc_context({"text.parse_math": False}):  # a dollar sign in a name is no formula
            below = Image.fromarray(self._draw(predictions, (width, height)))
        picture = Image.new("RGB", (width, above.height + height))
        picture.paste(above, (0, 0))
        picture.paste(below, (0, above.height))
        return picture

    def _draw(self, item: Any, size: tuple[int, int]) -> np.ndarray:
        """Return the part of the picture that is the model's own, of a width and a height in pixels."""
        halves, answers = look_inside(self.model, item.image)
        row = [*halves, "score", *["score"] * (len(answers) - len(halves) - 1)]
        figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        rows: Any = [row, [*answers, *["."] * (len(row) - len(answers))]]
        axes = figure.subplot_mosaic(rows)
        normalised = getattr(self.model.post_processor, "enable_normalization", False)
        low, high = (0, 1) if normalised else (float(item.anomaly_map.min()), float(item.anomaly_map.max()))
        for half, values in halves.items():
            axes[half].imshow(values, cmap="jet", vmin=low, vmax=high)
            axes[half].set_title(f"{half.capitalize()} part of the map", fontsize=8)
        for name, colours in answers.items():
            axes[name].imshow(colours)
            axes[name].set_title(name, fontsize=8)
        for name in (*halves, *answers):
            axes[name].set(xticks=[], yticks=[])
        good, threshold = good_scores(self.model.post_processor)
        lines = {} if threshold is None else {f"threshold: {threshold:.3f}": threshold}
        lines[f"this image: {float(item.pred_score):.3f}"] = float(item.pred_score)
        plot_scores(axes["score"], {f"{len(good)} good validation images": good} if len(good) else {}, lines)
        axes["score"].set_title("Score", fontsize=8)
        axes["score"].tick_params(labelsize=6)
        axes["score"].legend(fontsize=6)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3]


@torch.no_grad()
def look_inside(model: Dhkd, image: torch.Tensor) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Look at what the parts of a model make of an image.

    Args:
        model (Dhkd): Trained model.
        image (torch.Tensor): Image of shape ``(3, H, W)`` as the pre-processor returns it.

    Returns:
        tuple[dict[str, np.ndarray], dict[str, np.ndarray]]: Parts of the map by ``"fine"`` and ``"coarse"``, of shape
            ``(H, W)``, normalised like the map; and the answers as colours of shape ``(h, w, 3)`` in ``[0, 1]``, by
            network and layer.
    """
    network = model.model
    training = network.training
    network.eval()
    responses = network.respond(network.features(image[None].to(model.device)))
    halves = network.halves(responses, (image.shape[-2], image.shape[-1]))
    network.train(training)
    if isinstance(model.post_processor, PostProcessor):
        process: Any = model.post_processor
        halves = {name: process(InferenceBatch(anomaly_map=values)).anomaly_map for name, values in halves.items()}
    answers: dict[str, np.ndarray] = {}
    for layer, teacher, student in zip(network.layers, responses.teacher, responses.student, strict=True):
        networks = [f"Teacher, {layer}"] if network.students is None else [f"Teacher, {layer}", f"Student, {layer}"]
        maps = [values[0].movedim(0, -1).float().cpu().numpy() for values in (teacher, student)]
        answers.update(zip(networks, colours(maps[: len(networks)]), strict=True))
    return {name: values[0, 0].float().cpu().numpy() for name, values in halves.items()}, answers


def colours(maps: list[np.ndarray]) -> list[np.ndarray]:
    """Show vectors as colours, near ones in near colours: their first three principal components.

    Args:
        maps (list[np.ndarray]): Maps of vectors of the same shape ``(h, w, C)``, whose components are the same.

    Returns:
        list[np.ndarray]: Maps of shape ``(h, w, 3)`` with values in ``[0, 1]``; 0 for components that there aren't.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(4, 4, 8))
        >>> one, other = colours([vectors, vectors])
        >>> one.shape, np.allclose(one, other)
        ((4, 4, 3), True)
    """
    vectors = np.concatenate([values.reshape(-1, values.shape[-1]) for values in maps])
    count = min(3, *vectors.shape)
    found = np.zeros((len(vectors), 3))
    found[:, :count] = PCA(count).fit_transform(vectors)
    low, high = np.percentile(found, (CLIPPED, 100 - CLIPPED), axis=0)
    found = ((found - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    return [part.reshape(*maps[0].shape[:2], 3) for part in np.split(found, len(maps))]


def good_scores(post_processor: Any) -> tuple[np.ndarray, float | None]:
    """Return what a score is compared with.

    Args:
        post_processor (nn.Module | None): Post-processor of a trained model.

    Returns:
        tuple[np.ndarray, float | None]: Scores of the good validation images, and the threshold, as predictions have
            them; none of them, and ``None``, where they aren't known.
    """
    if not isinstance(post_processor, PostProcessor):
        return np.empty(0), None
    scores = torch.tensor(getattr(post_processor, "good_image_scores", []))
    if len(scores):
        scores = post_processor(InferenceBatch(pred_score=scores.to(post_processor.image_min))).pred_score.cpu()
    threshold = float(post_processor.normalized_image_threshold) if post_processor.enable_thresholding else None
    return scores.numpy(), threshold


def explain(data: Path, ckpt_path: Path, default_root_dir: Path = Path("results")) -> None:
    """Show what a trained model makes of an image, or of each image of a folder.

    Args:
        data (Path): Image, or folder of images.
        ckpt_path (Path): Checkpoint of the trained model.
        default_root_dir (Path): Folder of the results; pictures are in ``Dhkd/latest/explanations`` below it. Defaults
            to ``results``.

    Raises:
        ValueError: If ``data`` or ``ckpt_path`` isn't what it must be.
        UnfinishedError: If the checkpoint is of a training that isn't finished.
    """
    from anomalib.engine import Engine  # noqa: PLC0415  # takes seconds

    if not ckpt_path.is_file():
        msg = f"ckpt_path must be the file of a checkpoint, got {ckpt_path}."
        raise ValueError(msg)
    if not (data.is_dir() or (data.is_file() and is_image_file(data))):
        msg = f"data must be an image or a folder of images, got {data}."
        raise ValueError(msg)
    try:
        model = Dhkd.load_from_checkpoint(ckpt_path)  # with all that it was trained with, a missing part included
    except UnfinishedError:
        raise
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        msg = f"ckpt_path must be a checkpoint of Dhkd, got {ckpt_path}: {type(error).__name__}: {error}"
        raise ValueError(msg) from error
    visualizer: Any = InsideVisualizer()
    model.visualizer = visualizer
    engine = Engine(default_root_dir=default_root_dir, devices=1)
    engine.predict(model, data_path=data, return_predictions=False, ckpt_path=ckpt_path)
    written = visualizer.file_of(data, None) if data.is_file() else visualizer.output_dir
    print(f"Written: {written}")  # noqa: T201
