# SPDX-License-Identifier: Apache-2.0

"""Views of training images: each image as another lamp, lens, file or fixture would have shown it.

Training images are few and taken in one light. Directions in which they hardly vary carry the defects, and the light as
well; views of the light give it a variance of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from kornia import augmentation
from kornia.filters import filter2d_separable
from torch import nn

SEED = 0
"""The views of an image are the same in each training, also in one that is resumed."""
STRIDE = 1_000_000
"""Between the seeds of an image's views; a CPU's generator takes the last 32 bits of a seed alone."""
RESIZED = (0.127, 0.984, 0.127)
"""Filter that gives white noise the correlation of 1/4 between neighbours that a bilinear resize gives it."""


class RandomResizedNoise(augmentation.RandomGaussianNoise):
    """Gaussian noise as a camera's is after images were made smaller: neighbouring pixels share some of it.

    Views are made at the model's own size, where a camera's noise isn't white any more; a model that learns from white
    noise takes a camera's for a defect.

    Example:
        >>> noise = RandomResizedNoise(std=0.1, p=1.0)(torch.zeros(1, 3, 256, 256))
        >>> round(noise.std().item(), 2)
        0.1
    """

    def apply_transform(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: A002
        """Add the noise; see kornia's class."""
        noise = super().apply_transform(torch.zeros_like(input), *args, **kwargs)
        kernel = noise.new_tensor([RESIZED])
        return input + filter2d_separable(noise, kernel, kernel)


def light_views() -> nn.Module:
    """Return the default transform: place, exposure, colour, evenness, gamma, then at most one fault of camera or file.

    The last four faults go beyond what a line should meet. Without them, a stronger change than the others is taken for
    a defect; with them, what is unchanged is detected as well.

    Returns:
        nn.Module: Transform of images of shape ``(B, 3, H, W)`` with values in ``[0, 1]``.
    """
    faults = {
        nn.Identity(): 4,
        augmentation.RandomGaussianBlur((13, 13), (0.3, 2.0), p=1.0): 1.3,
        RandomResizedNoise(std=0.02, p=1.0): 0.7,
        RandomResizedNoise(std=0.05, p=1.0): 0.7,
        augmentation.RandomJPEG((50.0, 95.0), p=1.0): 1.3,
        augmentation.RandomGaussianBlur((25, 25), (1.0, 3.5), p=1.0): 1,
        RandomResizedNoise(std=0.12, p=1.0): 1,
        augmentation.RandomBrightness((1.1, 1.35), p=1.0): 1,
        augmentation.ColorJitter(contrast=(0.15, 0.6)): 1,
    }
    return nn.Sequential(
        augmentation.RandomAffine(2.0, translate=(0.01, 0.01), padding_mode="border", p=0.5),
        augmentation.ColorJitter(brightness=(0.8, 1.2)),
        augmentation.RandomPlanckianJitter(mode="blackbody", select_from=[6, 7, 8, 9], p=0.7),  # 6000 to 7500 K
        augmentation.RandomLinearIllumination(gain=(0.01, 0.2), sign=(-1.0, 0.0), p=0.5),
        augmentation.RandomGamma((0.8, 1.25), p=1.0),
        augmentation.ImageSequential(*faults, random_apply=1, random_apply_weights=list(faults.values())),
    )


class Views:
    """Changed views of images, beside the images as they are.

    Args:
        number (int): Changed views of each image; 0 for none.
        transform (nn.Module | None): Draws a view; of kornia or torchvision, for images of shape ``(1, 3, H, W)`` with
            values in ``[0, 1]``. ``None`` for :func:`light_views`.

    Raises:
        ValueError: If ``number`` is negative.

    Example:
        >>> image = torch.full((1, 3, 32, 32), 0.5)
        >>> unchanged, first, second = Views(2, None).of(image, [0])
        >>> unchanged is image, torch.equal(first, second)
        (True, False)
        >>> torch.equal(first, Views(1, None).of(image, [0])[1])
        True
    """

    def __init__(self, number: int, transform: nn.Module | None) -> None:
        if number < 0:
            msg = f"num_views must be at least 0, got {number}."
            raise ValueError(msg)
        self.number = number
        self.transform = transform if transform is not None else light_views()

    def of(self, images: torch.Tensor, indices: Sequence[int]) -> list[torch.Tensor]:
        """Return images and all their views.

        Args:
            images (torch.Tensor): Images of shape ``(B, 3, H, W)`` with values in ``[0, 1]``.
            indices (Sequence[int]): Number of each image in the training set, which seeds its views.

        Returns:
            list[torch.Tensor]: The images themselves, then ``number`` tensors of the same shape.
        """
        views = [images]
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            for view in range(self.number):
                changed = []
                for image, index in zip(images.split(1), indices, strict=True):
                    torch.manual_seed(SEED + view * STRIDE + index)
                    changed.append(self._change(image))
                views.append(torch.cat(changed))
        return views

    def drawn(self, images: torch.Tensor) -> torch.Tensor:
        """Return each image as it is or changed, all ``number + 1`` ways with the same probability.

        Args:
            images (torch.Tensor): Images of shape ``(B, 3, H, W)`` with values in ``[0, 1]``.

        Returns:
            torch.Tensor: Images of the same shape.
        """
        unchanged = torch.randint(self.number + 1, (len(images),)) == 0
        pairs = zip(images.split(1), unchanged, strict=True)
        return torch.cat([image if same else self._change(image) for image, same in pairs])

    def _change(self, image: torch.Tensor) -> torch.Tensor:
        changed = self.transform(image)
        if changed.shape != image.shape:
            msg = f"view_transform must keep the shape {tuple(image.shape)} of an image, got {tuple(changed.shape)}."
            raise ValueError(msg)
        return changed.clamp(0, 1)
