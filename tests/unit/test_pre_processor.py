# SPDX-License-Identifier: Apache-2.0

"""Pre-processing in training and in exported files."""

import logging

import pytest
import torch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.pre_processing import PreProcessor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from anomalib_dhkd import Dhkd
from anomalib_dhkd.pre_processor import AntialiasedResize, AntialiasingPreProcessor
from tests.helpers import small_dhkd


@pytest.mark.parametrize("size", [(64, 64), (61, 96), (64, 5)])
@pytest.mark.parametrize("image_size", [(64, 64), (300, 401), (1024, 700), (20, 33), (1, 2)])
def test_resize_is_that_of_torch(size: tuple[int, int], image_size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *image_size)
    expected = interpolate(images, size, mode="bilinear", antialias=True)
    resized = AntialiasedResize(size)(images)
    assert resized.shape == expected.shape
    assert (resized - expected).abs().max() < 1e-4
    assert (interpolate(images, size, mode="bilinear") - expected).abs().max() > 0.1 or image_size[0] <= 64


def test_images_of_the_target_size_are_left_alone() -> None:
    images = torch.rand(1, 3, 64, 48)
    assert AntialiasedResize((64, 48))(images) is images


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_exact_in_any_precision(dtype: torch.dtype) -> None:
    images = torch.full((1, 3, 3000, 2448), 0.5, dtype=dtype)
    resized = AntialiasedResize((320, 192))(images)
    assert resized.dtype == dtype
    assert (resized.double() - 0.5).abs().max() < 4 * torch.finfo(dtype).eps


def test_the_rest_of_a_transform_is_exported_as_by_anomalib() -> None:
    transform = Compose([Resize((96, 80), antialias=True), CenterCrop(64), Normalize([0.5] * 3, [0.5] * 3)])
    ours, theirs = AntialiasingPreProcessor(transform).export_transform, PreProcessor(transform).export_transform
    assert isinstance(ours.transforms[0], AntialiasedResize)
    assert isinstance(ours.transforms[1], ExportableCenterCrop)
    small = torch.rand(1, 3, 96, 80)
    assert torch.equal(ours(small), theirs(small))
    images = torch.rand(1, 3, 300, 200)
    assert (ours(images) - transform(images)).abs().max() < 1e-5
    assert (theirs(images) - transform(images)).abs().max() > 0.1
    assert AntialiasingPreProcessor(None).export_transform is None


@pytest.mark.parametrize(
    "transform", [Resize(64, antialias=True), Resize((64, 64), interpolation=InterpolationMode.BICUBIC, antialias=True)]
)
def test_what_loses_antialiasing_is_named(transform: Resize, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        AntialiasingPreProcessor(Resize((64, 64), antialias=False))
        assert not caplog.records
        AntialiasingPreProcessor(transform)
    assert "is exported without antialiasing" in caplog.text


@pytest.mark.parametrize("interpolation", ["bilinear", InterpolationMode.BILINEAR, 2])
def test_every_name_of_bilinear_is_known(interpolation: str | InterpolationMode | int) -> None:
    exported = AntialiasingPreProcessor(Resize((64, 64), interpolation=interpolation)).export_transform
    assert isinstance(exported, AntialiasedResize)


def test_a_plain_pre_processor_is_exported_with_antialiasing() -> None:
    images = torch.rand(1, 3, 300, 300)
    transform = Resize((64, 64), antialias=True)
    for model in (small_dhkd(pre_processor=PreProcessor(transform)), small_dhkd()):
        assert (model.pre_processor(images) - transform(images)).abs().max() < 1e-5
    assert Dhkd(pre_processor=False).pre_processor is None


def test_a_restored_transform_is_exported_with_antialiasing() -> None:
    images = torch.rand(1, 3, 300, 300)
    pre_processor = AntialiasingPreProcessor(Resize((32, 32)))
    transform = Resize((64, 48), antialias=True)
    pre_processor.load_checkpoint_config(PreProcessor(transform).checkpoint_config())
    assert (pre_processor(images) - transform(images)).abs().max() < 1e-5
