# SPDX-License-Identifier: Apache-2.0

"""Changes of test images: what varies from day to day at a production line, and the shifts of a published protocol.

They act on an image as its file has it, before it is resized. Values are clipped to [0, 1] afterwards.
"""

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from kornia.color import hsv_to_rgb, rgb_to_hsv
from kornia.filters import filter2d, gaussian_blur2d
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2 import functional as F  # noqa: N812


def vary_brightness(image: torch.Tensor, amount: float) -> torch.Tensor:
    """Multiply an image by a random factor between ``1 - amount`` and ``1 + amount``."""
    return image * torch.empty(()).uniform_(1 - amount, 1 + amount)


def balance(image: torch.Tensor, amount: float) -> torch.Tensor:
    """Shift the white balance: red times ``1 + amount``, blue times ``1 - amount``."""
    return image * torch.tensor([1 + amount, 1, 1 - amount])[:, None, None]


def fall_off(image: torch.Tensor, amount: float) -> torch.Tensor:
    """Let the light fall linearly from 1 to ``1 - amount`` across an image, in a random direction."""
    height, width = image.shape[-2:]
    angle = torch.empty(()).uniform_(0, 2 * math.pi)
    ramp = angle.sin() * torch.linspace(0, 1, height)[:, None] + angle.cos() * torch.linspace(0, 1, width)
    return image * (1 - amount * (ramp - ramp.min()) / (ramp.max() - ramp.min()))


def compress(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Store an image as JPEG of a quality from 1 to 100 and read it again."""
    stored = F.jpeg(F.to_dtype(image, torch.uint8, scale=True), quality)
    return F.to_dtype(stored, torch.float32, scale=True)


def defocus(image: torch.Tensor, amount: float) -> torch.Tensor:
    """Blur an image with a Gaussian whose standard deviation is a share of its height."""
    sigma = amount * image.shape[-2]
    return gaussian_blur2d(image[None], 2 * math.ceil(4 * sigma) + 1, (sigma, sigma))[0]


def move(image: torch.Tensor, shift: float = 0.0, degrees: float = 0.0) -> torch.Tensor:
    """Shift an image or a mask by a share of its height and width, and turn it; what comes in repeats the edge."""
    height, width = image.shape[-2:]
    padded = F.pad(image, [math.ceil(0.1 * max(height, width))], padding_mode="edge")
    translate = [shift * width, shift * height]
    moved = F.affine(padded, degrees, translate, 1.0, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)
    return F.center_crop(moved, [height, width])


def brighten_value(image: torch.Tensor, amount: float) -> torch.Tensor:
    """Add to an image's value in HSV."""
    hue, saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb(torch.stack([hue, saturation, (value + amount).clamp(0, 1)]))


def reduce_contrast(image: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiply the distance from each channel's mean."""
    mean = image.mean((-2, -1), keepdim=True)
    return (image - mean) * factor + mean


def blur_with_disk(image: torch.Tensor, radius: int, softness: float) -> torch.Tensor:
    """Blur an image as a lens out of focus does.

    Args:
        image (torch.Tensor): Image of shape ``(3, H, W)``.
        radius (int): Radius of the disk in pixels, at most 8.
        softness (float): Standard deviation of the Gaussian that smooths the disk's edge, in pixels.

    Returns:
        torch.Tensor: Image of the same shape.
    """
    squares = torch.arange(-8, 9).square()
    disk = (squares[:, None] + squares <= radius**2).float()
    kernel = F.gaussian_blur((disk / disk.sum())[None], [3, 3], [softness, softness])
    return filter2d(image[None], kernel)[0]


class Change(NamedTuple):
    """A change.

    Attributes:
        apply (Callable[[torch.Tensor], torch.Tensor]): Changes an image of shape ``(3, H, W)`` in [0, 1].
        moves (bool): Whether the mask, of shape ``(H, W)``, changes in the same way.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    moves: bool = False


UNCHANGED = "unchanged"
"""Name of no change, which the changes are compared with."""
SETS = {
    "line": {
        "5 % dimmer": Change(partial(F.adjust_brightness, brightness_factor=0.95)),
        "15 % dimmer": Change(partial(F.adjust_brightness, brightness_factor=0.85)),
        "10 % brighter": Change(partial(F.adjust_brightness, brightness_factor=1.1)),
        "light varying by 10 %": Change(partial(vary_brightness, amount=0.1)),
        "gamma 0.85": Change(partial(F.adjust_gamma, gamma=0.85)),
        "white balance 4 %": Change(partial(balance, amount=0.04)),
        "light falling off by 15 %": Change(partial(fall_off, amount=0.15)),
        "noise 2 %": Change(partial(F.gaussian_noise, sigma=0.02, clip=False)),
        "noise 5 %": Change(partial(F.gaussian_noise, sigma=0.05, clip=False)),
        "JPEG 90": Change(partial(compress, quality=90)),
        "JPEG 60": Change(partial(compress, quality=60)),
        "defocus": Change(partial(defocus, amount=2 / 384)),
        "shift of 1 %": Change(partial(move, shift=0.01), moves=True),
        "rotation of 2 degrees": Change(partial(move, degrees=2.0), moves=True),
    },
    # Severity 3 of ImageNet-C (Hendrycks & Dietterich, ICLR 2019), which "Anomaly Detection under Distribution Shift"
    # (Cao et al., ICCV 2023) tests on.
    "ADShift": {
        "ADShift brightness": Change(partial(brighten_value, amount=0.3)),
        "ADShift contrast": Change(partial(reduce_contrast, factor=0.2)),
        "ADShift defocus blur": Change(partial(blur_with_disk, radius=6, softness=0.5)),
        "ADShift Gaussian noise": Change(partial(F.gaussian_noise, sigma=0.18, clip=False)),
    },
}
"""Changes by set and name."""
CHANGES = {UNCHANGED: Change(lambda image: image)} | SETS["line"] | SETS["ADShift"]
"""All changes by name."""


class ChangeImages(Transform):
    """Changes an image, and its mask where the image moves.

    Random numbers depend on the change and the image alone. So each model sees the same images, in whatever order and
    from whatever process.

    Args:
        name (str): A key of ``CHANGES``.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, image: torch.Tensor, *masks: torch.Tensor) -> Any:
        """Return the changed image, and the masks if there are any.

        Args:
            image (torch.Tensor): Image of shape ``(3, H, W)`` with values in [0, 1].
            *masks (Mask): Its masks, of shape ``(H, W)``.

        Returns:
            Any: The image, or a tuple of it and the masks.
        """
        change = CHANGES[self.name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode() + image.numpy().tobytes()))
            changed = tv_tensors.wrap(change.apply(image).clamp(0, 1), like=image)
        if change.moves:
            masks = tuple(change.apply(mask) for mask in masks)
        return (changed, *masks) if masks else changed

    def extra_repr(self) -> str:
        """Return the name."""
        return self.name
