# SPDX-License-Identifier: Apache-2.0

"""Features of the training images and their views, kept so that each goes through the backbone only once."""

import itertools
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import Resize

from .progress import track
from .views import Views

logger = logging.getLogger(__name__)


@dataclass
class FeatureBatch:
    """Features in the place of a batch of images.

    Attributes:
        features (list[torch.Tensor]): A map of shape ``(B, C, h, w)`` a scale.
        image: None; anomalib's pre-processor looks at it.
        gt_mask: None; likewise.
    """

    features: list[torch.Tensor]
    image: None = None
    gt_mask: None = None


class FeatureDataset(Dataset):
    """Features of images in half precision, in memory, or in a memory-mapped temporary file if they need too much.

    The file is in the folder of temporary files (``TMPDIR``) and vanishes with the data set. An item is one of the
    views of an image, drawn at each call.

    Args:
        length (int): Number of images.
        limit (float): Memory in GiB above which the file is used.
        per_image (int): Items of each image: its own features and those of its views. Defaults to ``1``.
        generator (torch.Generator | None): Draws the views. Defaults to PyTorch's own.

    Example:
        >>> features = FeatureDataset(length=2, limit=1.0, per_image=3)
        >>> features.append([torch.zeros(6, 8, 4, 4)])
        >>> features.__getitems__([1, 0, 1]).features[0].shape
        torch.Size([3, 8, 4, 4])
    """

    def __init__(self, length: int, limit: float, per_image: int = 1, generator: torch.Generator | None = None) -> None:
        self.length = length
        self.limit = limit
        self.per_image = per_image
        self.generator = generator
        self.file: mmap.mmap | None = None
        self._filled = 0
        self._scales: list[torch.Tensor] = []

    def __len__(self) -> int:
        return self.length

    def append(self, features: list[torch.Tensor]) -> None:
        """Keep the features of the next images.

        Args:
            features (list[torch.Tensor]): A map of shape ``(B * per_image, C, h, w)`` a scale, all of an image after
                another.

        Raises:
            OSError: If a file is needed and its folder has too little space.
        """
        # Channels last, as the networks want them.
        rows = [feature.movedim(1, -1).to("cpu", torch.float16) for feature in features]
        if not self._scales:
            self._scales = self._allocate([(self.length * self.per_image, *row.shape[1:]) for row in rows])
        end = self._filled + len(rows[0])
        for scale, row in zip(self._scales, rows, strict=True):
            scale[self._filled : end] = row
        self._filled = end
        self._release()

    def __getitems__(self, indices: Sequence[int]) -> FeatureBatch:
        """Return the features of a batch of images in single precision; PyTorch's data loader calls this.

        Args:
            indices (Sequence[int]): Indices of images.

        Returns:
            FeatureBatch: Their features.
        """
        images = torch.as_tensor(indices)
        views = torch.randint(self.per_image, images.shape, generator=self.generator)
        return FeatureBatch(self._rows(images * self.per_image + views))

    def _rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        features = [scale[rows].float().movedim(-1, 1) for scale in self._scales]
        self._release()
        return features

    @staticmethod
    def collate_fn(batch: FeatureBatch) -> FeatureBatch:
        """Return the batch, which is one already; anomalib's data modules ask their data sets for this."""
        return batch

    def batches(self, size: int) -> Iterator[list[torch.Tensor]]:
        """Yield the features of all views in the order of the images, ``size`` of them at a time."""
        yield from map(self._rows, torch.arange(self.length * self.per_image).split(size))

    def clear(self) -> None:
        """Let go of the features, and of the file; the trainer holds on to the data set itself."""
        self._scales = []
        self.file = None

    def _allocate(self, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        needed = sum(sizes) * torch.float16.itemsize
        gibibytes = needed / 1024**3
        if gibibytes <= self.limit:
            logger.info("Features take %.2f GiB and are kept in memory.", gibibytes)
            return [torch.empty(shape, dtype=torch.float16) for shape in shapes]
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free / 1024**3
        logger.info("Features take %.2f GiB and are kept in a file in %s.", gibibytes, folder)
        if gibibytes > free:
            msg = (
                f"cache_limit is {self.limit} GiB, so {gibibytes:.2f} GiB of features go to a file in {folder}, where "
                f"{free:.2f} GiB are free. Raise cache_limit, set it to None, or name a roomier folder in TMPDIR."
            )
            raise OSError(msg)
        with tempfile.TemporaryFile() as file:
            file.truncate(needed)
            if hasattr(os, "posix_fallocate"):  # without room of its own, a disk that fills up would end the process
                os.posix_fallocate(file.fileno(), 0, needed)
            self.file = mmap.mmap(file.fileno(), needed)
        values = torch.frombuffer(self.file, dtype=torch.float16)
        return [part.view(shape) for part, shape in zip(values.split(sizes), shapes, strict=True)]

    def _release(self) -> None:
        # Pages of the file would count as this process' memory; the system may keep them, and drop them when it must.
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)


class FeatureCache(Callback):
    """Has the data module train on kept features in the place of its images, as long as ``fit`` lasts.

    Images that may differ from epoch to epoch are left alone; their features are then extracted at every step.

    Args:
        limit (float | None): Memory in GiB above which a file is used; with ``None`` nothing is kept.
        views (Views): Views of the images, which are kept beside them.

    Raises:
        ValueError: If ``limit`` is negative.
    """

    def __init__(self, limit: float | None, views: Views) -> None:
        if limit is not None and not limit >= 0:
            msg = f"cache_limit must be at least 0 or None, got {limit!r}."
            raise ValueError(msg)
        self.limit = limit
        self.views = views
        self._kept: FeatureDataset | None = None
        self._images: Any = None
        self._num_workers = 0
        self._generator: torch.Generator | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the data set of features into the data module, still empty."""
        del pl_module  # Unused argument.
        if stage != "fit":
            return
        datamodule: Any = trainer.datamodule
        self._generator = torch.Generator()
        if reason := self._reason_against(trainer, datamodule):
            logger.info("Features are extracted at every step, because %s.", reason)
            return
        self._images, self._num_workers = datamodule.train_data, datamodule.num_workers
        self._kept = datamodule.train_data = FeatureDataset(
            len(self._images), self.limit or 0, self.views.number + 1, self._generator
        )
        datamodule.num_workers = 0  # a worker process would take longer to hand a batch over than to find it

    def _reason_against(self, trainer: Any, datamodule: Any) -> str:
        if self.limit is None:
            return "cache_limit is None"
        if trainer.fast_dev_run:
            return "fast_dev_run looks at a few of them only"
        if not isinstance(datamodule, AnomalibDataModule):
            return "the training images don't come from a data module of anomalib"
        # anomalib puts the pre-processor's resizing among the augmentations.
        changing = not isinstance(getattr(datamodule.train_data, "augmentations", None), Resize | None)
        if changing or datamodule.external_collate_fn is not None:
            return "the training images may be augmented"
        return ""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the data module its workers back: the training data loader is made, the others need them."""
        if self._kept is not None:
            trainer.datamodule.num_workers = self._num_workers

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Extract the features of all training images."""
        if isinstance(trainer.train_dataloader, DataLoader):
            sampler: Any = trainer.train_dataloader.sampler
            sampler.generator = self._generator
        self.on_train_epoch_start(trainer, pl_module)  # which Lightning doesn't call when a run is resumed
        if self._kept is None:
            return
        number = self.views.number
        logger.info("Extracting the features of %d training images and %d views of each.", len(self._images), number)
        size = trainer.datamodule.train_batch_size
        loader = DataLoader(self._images, size, num_workers=self._num_workers, collate_fn=self._images.collate_fn)
        for features in track(trainer, self._extract(pl_module, loader), "Extracting features", len(loader)):
            self._kept.append(features)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Have the epoch's order and views follow from the training's seed and the step, as a resumed run has them."""
        if self._generator is not None:
            self._generator.manual_seed(pl_module.seed_of(0))

    def features(self, batch: Any, pl_module: Any) -> list[torch.Tensor]:
        """Return the features of a batch in training: each image's as it is, or of one of its views.

        Args:
            batch (Batch | FeatureBatch): Images, or features that were kept.
            pl_module (Dhkd): Model whose backbone extracts what isn't kept.

        Returns:
            list[torch.Tensor]: A map of shape ``(B, C, h, w)`` a scale, as the backbone gives it.
        """
        if isinstance(batch, FeatureBatch):
            return batch.features
        return pl_module.model.features.extract(self.views.drawn(batch.image))

    def batches(self, trainer: Any, pl_module: Any) -> Iterator[list[torch.Tensor]]:
        """Yield the features of the training images and all their views once, as the backbone gives them.

        Args:
            trainer (Trainer): Trainer within ``fit``.
            pl_module (Dhkd): Model whose backbone extracts what isn't kept.

        Yields:
            list[torch.Tensor]: A map of shape ``(B, C, h, w)`` a scale, on the model's device.
        """
        if self._kept is None:
            training: Any = trainer.train_dataloader  # of which several devices have a part each, and in another order
            loader = DataLoader(
                training.dataset,
                batch_size=training.batch_size,
                num_workers=training.num_workers,
                collate_fn=training.collate_fn,
            )
            total = int(trainer.num_training_batches) * trainer.world_size
            batches = self._extract(pl_module, itertools.islice(loader, total))
        else:
            size = trainer.datamodule.train_batch_size
            batches, total = self._kept.batches(size), -(-len(self._kept) * self._kept.per_image // size)
        for features in track(trainer, batches, "Calibrating", total):
            yield [feature.to(pl_module.device) for feature in features]

    @torch.no_grad()
    def _extract(self, pl_module: Any, batches: Iterable[Any]) -> Iterator[list[torch.Tensor]]:
        """Yield the backbone's features of batches of images, as the training steps see them, and of their views."""
        transform = getattr(pl_module.pre_processor, "transform", None)
        first = 0
        for batch in batches:
            images = batch.image.to(pl_module.device)
            images = transform(images) if transform else images
            views = self.views.of(images, range(first, first + len(images)))
            features = map(pl_module.model.features.extract, views)
            yield [torch.stack(scale, dim=1).flatten(0, 1) for scale in zip(*features, strict=True)]
            first += len(images)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the data module its images back."""
        del pl_module, stage  # Unused arguments.
        self._generator = None  # worker processes couldn't be given the model with it
        if self._kept is not None:
            datamodule: Any = trainer.datamodule
            datamodule.train_data, datamodule.num_workers = self._images, self._num_workers
            self._kept.clear()
            self._kept = self._images = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Do the same after an error, after which Lightning calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")
