# SPDX-License-Identifier: Apache-2.0

"""Pictures of predictions whose names follow the images' paths."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.loggers.base import ImageLoggerBase
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer

logger = logging.getLogger(__name__)


class PathVisualizer(ImageVisualizer):
    """anomalib's visualizer, but no picture takes the place of another image's.

    anomalib keeps of an image's path what follows the data set's name, or, where there is none, one folder. Pictures of
    a data module's images keep these names, unless another image has had the name already. That one, and each image
    that comes from no data module, has its whole path below ``output_dir``: relative to the working directory, or to
    the file system's root if it lies elsewhere.

    At the end of a prediction, the log says how many images are anomalous, and where the pictures are.

    anomalib's loggers (TensorBoard, MLflow, W&B, Comet) get the first picture of each folder of images, too.

    Args:
        **kwargs: Arguments of :class:`anomalib.visualization.ImageVisualizer`.

    Example:
        >>> visualizer = PathVisualizer(output_dir="images")
        >>> [str(visualizer.file_of(f"/data/{line}/ok/000.png", None)) for line in ("lineA", "lineB")]
        ['images/data/lineA/ok/000.png', 'images/data/lineB/ok/000.png']
    """

    folder = "images"
    """Where the pictures go in the run's folder, unless ``output_dir`` is given."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.images: dict[Path, Path] = {}
        self.logged: set[Path] = set()
        self.verdicts: list[bool | None] = []

    def file_of(self, image_path: str | Path, datamodule: Any) -> Path:
        """Return where the picture of an image goes.

        Args:
            image_path (str | Path): The image.
            datamodule (AnomalibDataModule | None): Where it comes from.

        Returns:
            Path: File of the picture.
        """
        image, folder = Path(image_path), Path(self.output_dir or "")
        image = image.parent.resolve() / image.name  # a link has a name of its own
        if datamodule is not None:
            names = getattr(datamodule, "name", None), getattr(datamodule, "category", None)
            file = generate_output_filename(image, folder, *names, mkdir=False)
            if self.images.setdefault(file, image) == image:
                return file
        working_directory = Path.cwd()
        base = working_directory if image.is_relative_to(working_directory) else Path(image.anchor)
        return folder / image.relative_to(base)

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Save the pictures of a batch, log the first one of each folder, and note the verdicts.

        Args:
            trainer (Trainer): Lightning trainer.
            pl_module (Dhkd): Unused.
            outputs (Batch): Unused.
            batch (ImageBatch): Images with predictions.
            batch_idx (int): 0 for the first batch.
            dataloader_idx (int): Unused.
        """
        del pl_module, outputs, dataloader_idx  # Unused arguments.
        if batch_idx == 0:
            self.logged.clear()
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / self.folder
        loggers = [logger for logger in trainer.loggers if isinstance(logger, ImageLoggerBase)]
        for item in batch:
            self.verdicts.append(None if item.pred_label is None else bool(item.pred_label))
            picture: Any = self.visualize(item)
            if picture is not None:
                file = self.file_of(item.image_path, getattr(trainer, "datamodule", None))
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file)
                if file.parent not in self.logged:
                    self.logged.add(file.parent)
                    name = file.relative_to(self.output_dir).as_posix()
                    for logger in loggers:
                        logger.add_image(np.asarray(picture), name, global_step=trainer.global_step)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin anew with the verdicts.

        Args:
            trainer (Trainer): Lightning trainer.
            pl_module (Dhkd): Unused.
        """
        super().on_predict_start(trainer, pl_module)
        self.verdicts = []

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Say how many images are anomalous, and where the pictures are.

        Args:
            trainer (Trainer): Lightning trainer.
            pl_module (Dhkd): Unused.
        """
        super().on_predict_end(trainer, pl_module)
        counts = torch.tensor([len(self.verdicts), self.verdicts.count(True), self.verdicts.count(None)])
        images, anomalous, unknown = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        logger.info(
            "Predicted %d images%s. Pictures: %s",
            images,
            "" if unknown else f", {anomalous} of them anomalous",
            self.output_dir,
        )
