# SPDX-License-Identifier: Apache-2.0

"""Pre-processing that an exported file does as training did it, antialiasing included."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torchvision.transforms.v2 import Compose, Resize, Transform

logger = logging.getLogger(__name__)

ROW_STRIPS, COLUMN_STRIPS = 16, 8
"""Strips that rows and columns are computed in: more have less to compute, and more operations."""


class AntialiasedResize(nn.Module):
    """Bilinear resize with antialiasing, as torchvision's, out of operations that can be exported for any image size.

    An output row is a mean of the input rows near it, weighted by a triangle that reaches to the next output row on
    either side, or to the next input row where the image is enlarged. All rows are hence a product with a matrix, and
    so are all columns. The matrices are nearly empty, therefore each strip of output rows is computed from the input
    rows that it needs.

    Weights that don't sum to 1, as rounded ones don't, draw stripes on a plain ground. OpenVINO's own ``Interpolate``
    with ``bilinear_pillow`` takes ten times as long.

    Args:
        size (tuple[int, int]): Height and width of the output in pixels.

    Example:
        >>> images = torch.rand(1, 3, 1024, 768)
        >>> expected = torch.nn.functional.interpolate(images, (320, 320), mode="bilinear", antialias=True)
        >>> torch.allclose(AntialiasedResize((320, 320))(images), expected, atol=1e-4)
        True
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Resize.

        Args:
            images (torch.Tensor): Images of shape ``(B, C, H, W)``.

        Returns:
            torch.Tensor: Images of shape ``(B, C, height, width)``.
        """
        (rows, columns), (height, width) = images.shape[-2:], self.size
        if not statically_known_true(rows == height):
            strips = _strips(rows, height, ROW_STRIPS, images)
            images = torch.cat([weights.mT @ images.index_select(-2, sources) for sources, weights in strips], dim=-2)
        if not statically_known_true(columns == width):
            strips = _strips(columns, width, COLUMN_STRIPS, images)
            images = torch.cat([images.index_select(-1, sources) @ weights for sources, weights in strips], dim=-1)
        return images


def _strips(inputs: Any, outputs: int, count: int, like: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each strip of output positions the input positions that it needs, and their weights.

    Args:
        inputs (int | torch.SymInt): Number of input positions.
        outputs (int): Number of output positions.
        count (int): Number of strips.
        like (torch.Tensor): Tensor whose type and device the weights get.

    Yields:
        tuple[torch.Tensor, torch.Tensor]: Input positions, and weights of shape
            ``(1, 1, input positions, output positions)`` that sum to 1 for each output.
    """
    # Whole numbers, which are exact in any precision: the centre of position i is (2 i + 1) / 2, and distances are
    # multiplied by twice the number of outputs.
    reach = 2 * torch.sym_max(inputs, outputs)
    step = -(-outputs // count)
    window = ((2 * step - 1) * inputs + 2 * reach) // (2 * outputs) + 2
    starts = torch.arange(0, outputs, step, device=like.device)[:, None]
    first = ((2 * starts + 1) * inputs - reach).div(2 * outputs, rounding_mode="floor")
    sources = first + torch.arange(window, device=like.device)
    targets = starts + torch.arange(step, device=like.device)
    distance = (2 * sources + 1)[:, :, None] * outputs - (2 * targets + 1)[:, None] * inputs
    within = ((sources >= 0) & (sources < inputs))[:, :, None]
    triangle = torch.relu(reach - distance.abs()) * within
    triangle = triangle[:, None, None]  # four dimensions in a strip, as images have
    # No division: OpenVINO replaces it, which loses its precision.
    weights = triangle.to(like.dtype) * (-1 * triangle.sum(dim=-2, keepdim=True).to(like.dtype).log()).exp()
    for index, start in enumerate(range(0, outputs, step)):
        yield sources[index].clamp(0, inputs - 1), weights[index, ..., : outputs - start]


def exportable(transform: Transform | None) -> Any:
    """Return what does the same as a transform and can be exported.

    Args:
        transform (Transform | None): Transform of a pre-processor.

    Returns:
        Any: The same as anomalib returns, but with antialiasing in what resizes bilinearly to a given height and
            width. Other resizes lose it, which is logged.
    """
    if isinstance(transform, Compose):
        return Compose([exportable(part) for part in transform.transforms])
    if isinstance(transform, Resize) and transform.antialias:
        mode = getattr(transform.interpolation, "value", transform.interpolation)  # names and Pillow's numbers, too
        if mode in {"bilinear", 2} and transform.size is not None and len(transform.size) == 2:
            return AntialiasedResize(tuple(transform.size))
        if mode not in {"nearest", "nearest-exact", 0}:
            logger.warning(
                "%s is exported without antialiasing: exported files will give other scores than Engine. Resize "
                "bilinearly to a height and a width instead.",
                transform,
            )
    return get_exportable_transform(transform)


class AntialiasingPreProcessor(PreProcessor):
    """anomalib's pre-processor, but what it exports resizes with antialiasing, as it does in training.

    Args:
        transform (Transform | None): Transform of images and masks. Defaults to ``None``.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.export_transform = exportable(self.transform)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore configuration that ``checkpoint_config`` returned.

        Args:
            config (dict[str, Any]): Plain-data configuration to restore.
        """
        super().load_checkpoint_config(config)
        self.export_transform = exportable(self.transform)
