# SPDX-License-Identifier: Apache-2.0

"""Views of the light: what they are, and that a training uses them and an exported model does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kornia.augmentation import RandomGamma
from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2 import ColorJitter, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.v2.functional import resize

from anomalib_dhkd import Dhkd, Quickstart
from anomalib_dhkd.feature_cache import FeatureDataset
from anomalib_dhkd.views import RandomResizedNoise, Views
from tests.helpers import fit, small_dhkd


def test_views_of_an_image_are_always_the_same() -> None:
    """Whatever the batch and the state of the random numbers, which are as they were afterwards."""
    images = torch.rand(4, 3, 32, 32)
    together = Views(2, None).of(images, range(4))
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    apart = Views(2, None).of(images[2:], range(2, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one[2:], other, rtol=0, atol=0)


def test_the_default_changes_light_and_keeps_the_picture() -> None:
    image = torch.rand(1, 3, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3) * 0.6 + 0.2
    unchanged, *views = Views(60, None).of(image, [0])
    assert unchanged is image
    brightness = torch.tensor([view.mean() / image.mean() for view in views])
    assert brightness.min() < 0.85
    assert brightness.max() > 1.15
    for view in views:
        assert view.min() >= 0
        assert view.max() <= 1
        alike = torch.corrcoef(torch.stack([image.flatten(), view.flatten()]))[0, 1]
        assert alike > 0.3
        assert not torch.equal(view, image)


@pytest.mark.parametrize("size", [384, 1024])
def test_noise_is_as_a_resize_leaves_a_cameras(size: int) -> None:
    """The same from pixel to pixel, whatever size the images had."""

    def correlations(noise: torch.Tensor) -> list[float]:
        """Return those of neighbours in a row and in a column, and of next but one."""
        pairs = (
            (noise[..., 1:], noise[..., :-1]),
            (noise[..., 1:, :], noise[..., :-1, :]),
            (noise[..., 2:], noise[..., :-2]),
        )
        return [float((one * other).mean() / noise.var()) for one, other in pairs]

    cameras = resize(torch.randn(1, 3, size, size), [320, 320], antialias=True)
    noise = RandomResizedNoise(std=0.05, p=1.0)(torch.zeros(1, 3, 320, 320))
    assert noise.std().item() == pytest.approx(0.05, rel=0.02)
    assert correlations(noise) == pytest.approx(correlations(cameras), abs=0.03)


def test_some_views_move_the_picture() -> None:
    """The border between black and white, row by row."""
    image = torch.full((1, 3, 256, 256), 0.2)
    image[..., 128:] = 0.8
    moved = []
    for view in Views(60, None).of(image, [0])[1:]:
        smooth = avg_pool2d(view.mean(dim=1), 9, 1)
        borders = (smooth < (smooth.amin() + smooth.amax()) / 2).sum(dim=2) + 4.0
        moved.append((borders - 128).abs().amax() > 1.5)
    assert 0.3 < torch.stack(moved).float().mean() < 0.7


@pytest.mark.parametrize("transform", [RandomGamma((0.5, 0.6), p=1.0), ColorJitter(brightness=(0.5, 0.6))])
def test_a_users_own_transform(transform: nn.Module) -> None:
    images = torch.rand(2, 3, 16, 16) * 0.9 + 0.1
    unchanged, view = Views(1, transform).of(images, [0, 1])
    assert ((view - unchanged).abs().amax(dim=(1, 2, 3)) > 0.1).all()


def test_a_transform_that_changes_the_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"view_transform must keep the shape \(1, 3, 16, 16\) .*, got \(1, 3, 8, 8\)"):
        Views(1, RandomResizedCrop(8)).of(torch.rand(1, 3, 16, 16), [0])


def test_of_images_that_are_drawn_some_are_unchanged() -> None:
    images = torch.rand(200, 3, 8, 8)
    changed = (Views(3, RandomGamma((0.5, 0.6), p=1.0)).drawn(images) != images).flatten(1).any(dim=1)
    assert 0.6 < changed.float().mean() < 0.9
    assert torch.equal(Views(0, None).drawn(images), images)


@pytest.mark.parametrize("how", ["cached", "uncached", "augmented"])
def test_a_training_sees_views(how: str, quickstart: Quickstart, tmp_path: Path) -> None:
    """Statistics of inverted images: they differ from those of the images alone."""

    class Invert(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return 1 - image

    class Look(Callback):
        cached = False

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.cached = isinstance(trainer.datamodule.train_data, FeatureDataset)

    if how == "augmented":
        quickstart.train_augmentations = RandomHorizontalFlip()
    means = []
    for num_views in (0, 1):
        model = small_dhkd(
            train_steps=2, num_views=num_views, view_transform=Invert(), cache_limit=None if how == "uncached" else 2.0
        )
        look = Look()
        fit(quickstart, tmp_path, model, callbacks=[look], limit_val_batches=1)
        assert look.cached == (how == "cached")
        means.append(model.model.features.statistics[0].running_mean)
    assert (means[1] - means[0]).abs().max() > 0.01


def test_a_checkpoint_does_without_the_users_transform(quickstart: Quickstart, tmp_path: Path) -> None:
    model = small_dhkd(train_steps=2, num_views=1, view_transform=RandomGamma((0.5, 0.6), p=1.0))
    engine, _ = fit(quickstart, tmp_path, model)
    loaded = Dhkd.load_from_checkpoint(engine.best_model_path).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).pred_score, model.eval()(images).pred_score, rtol=0, atol=0)


def test_the_detector_knows_nothing_of_views() -> None:
    states = [small_dhkd(num_views=number).state_dict().keys() for number in (0, 3)]
    assert states[0] == states[1]
