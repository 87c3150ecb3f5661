# SPDX-License-Identifier: Apache-2.0

"""Features of the training images, kept so that images are decoded and sent through the backbone only once."""

import logging
import mmap
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

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


class FeatureCache(Dataset):
    """Features of images in half precision, in memory, or in a memory-mapped temporary file if they need too much.

    The file is in the folder of temporary files (``TMPDIR``) and vanishes with the cache.

    Args:
        length (int): Number of images.
        limit (float): Memory in GiB above which the file is used.

    Example:
        >>> cache = FeatureCache(length=2, limit=1.0)
        >>> cache.append([torch.zeros(2, 8, 4, 4)])
        >>> cache.__getitems__([1, 0, 1]).features[0].shape
        torch.Size([3, 8, 4, 4])
    """

    def __init__(self, length: int, limit: float) -> None:
        self.length = length
        self.limit = limit
        self.file: mmap.mmap | None = None
        self._filled = 0
        self._scales: list[torch.Tensor] = []

    def __len__(self) -> int:
        return self.length

    def append(self, features: list[torch.Tensor]) -> None:
        """Keep the features of the next images.

        Args:
            features (list[torch.Tensor]): A map of shape ``(B, C, h, w)`` a scale.

        Raises:
            OSError: If a file is needed and its folder has too little space.
        """
        # Channels last, as the networks want them.
        rows = [feature.movedim(1, -1).to("cpu", torch.float16) for feature in features]
        if not self._scales:
            self._scales = self._allocate([(self.length, *row.shape[1:]) for row in rows])
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
        rows = torch.as_tensor(indices)
        features = [scale[rows].float().movedim(-1, 1) for scale in self._scales]
        self._release()
        return FeatureBatch(features)

    def batches(self, size: int) -> Iterator[list[torch.Tensor]]:
        """Yield all features in the order of the images, ``size`` images at a time."""
        for indices in torch.arange(self.length).split(size):
            yield self.__getitems__(indices.tolist()).features

    def clear(self) -> None:
        """Let go of the features, and of the file."""
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
            self.file = mmap.mmap(file.fileno(), needed)
        values = torch.frombuffer(self.file, dtype=torch.float16)
        return [part.view(shape) for part, shape in zip(values.split(sizes), shapes, strict=True)]

    def _release(self) -> None:
        # Pages of the file would count as this process' memory; the system may keep them, and drop them when it must.
        if self.file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.file.madvise(mmap.MADV_DONTNEED)
