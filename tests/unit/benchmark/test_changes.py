# SPDX-License-Identifier: Apache-2.0

"""Each change against its definition, by other libraries where they have it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from skimage.color import hsv2rgb, rgb2hsv
from torchvision import tv_tensors

from anomalib_dhkd.benchmark.changes import CHANGES, SETS, UNCHANGED, ChangeImages

HEIGHT, WIDTH = 192, 256


def _image(seed: int = 0) -> tv_tensors.Image:
    """Return a smooth image with values from 0.2 to 0.8 in 8 bits."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((3, HEIGHT, WIDTH)), (0, 4, 4))
    smooth = 0.2 + 0.6 * (smooth - smooth.min()) / np.ptp(smooth)
    return tv_tensors.Image(torch.from_numpy((255 * smooth).round() / 255).float())


def _mask() -> tv_tensors.Mask:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    mask[40:90, 60:160] = 1
    return tv_tensors.Mask(mask)


def _changed(name: str, image: torch.Tensor | None = None) -> np.ndarray:
    return ChangeImages(name)(_image() if image is None else image).numpy()


def _even(value: float) -> tv_tensors.Image:
    return tv_tensors.Image(torch.full((3, HEIGHT, WIDTH), value))


def test_sets() -> None:
    assert {key: len(changes) for key, changes in SETS.items()} == {"line": 14, "ADShift": 4}
    assert len(CHANGES) == 19


@pytest.mark.parametrize("name", CHANGES)
def test_shape_type_and_range(name: str) -> None:
    for image in (_image(), _even(0.0), _even(1.0)):
        changed, mask = ChangeImages(name)(image, _mask())
        assert isinstance(changed, tv_tensors.Image)
        assert isinstance(mask, tv_tensors.Mask)
        assert changed.shape == image.shape
        assert changed.dtype == torch.float32
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert mask.dtype == torch.uint8
        assert set(mask.unique().tolist()) == {0, 1}
        assert mask.equal(_mask()) == (name not in {"shift of 1 %", "rotation of 2 degrees"})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (UNCHANGED, lambda image: image),
        ("5 % dimmer", lambda image: 0.95 * image),
        ("15 % dimmer", lambda image: 0.85 * image),
        ("10 % brighter", lambda image: 1.1 * image),
        ("gamma 0.85", lambda image: image**0.85),
        ("white balance 4 %", lambda image: image * np.array([1.04, 1, 0.96]).reshape(3, 1, 1)),
        ("defocus", lambda image: ndimage.gaussian_filter(image, (0, 1, 1), mode="mirror")),  # 2 px at 384 px
        ("ADShift contrast", lambda image: (image - image.mean((1, 2), keepdims=True)) * 0.2 + image.mean((1, 2))[:, None, None]),  # noqa: E501
    ],
)  # fmt: skip
def test_changes_that_are_not_random(name: str, expected: object) -> None:
    np.testing.assert_allclose(_changed(name), expected(_image().numpy()), atol=1e-4)


def test_brightness_of_adshift() -> None:
    hsv = rgb2hsv(_image().numpy(), channel_axis=0)
    hsv[2] = np.clip(hsv[2] + 0.3, 0, 1)
    np.testing.assert_allclose(_changed("ADShift brightness"), hsv2rgb(hsv, channel_axis=0), atol=1e-4)
    np.testing.assert_allclose(_changed("ADShift brightness", _even(0.0)), 0.3, atol=1e-4)


def test_defocus_blur_of_adshift() -> None:
    """A point becomes a disk with a radius of 6 px and a smoothed edge."""
    rows, columns = np.mgrid[-8:9, -8:9]
    disk = (rows**2 + columns**2 <= 36).astype(float)
    disk = ndimage.gaussian_filter(disk / disk.sum(), 0.5, radius=1)
    image = _image().numpy()
    expected = np.stack([ndimage.convolve(channel, disk, mode="mirror") for channel in image])
    np.testing.assert_allclose(_changed("ADShift defocus blur"), expected, atol=1e-4)


@pytest.mark.parametrize(("name", "std"), [("noise 2 %", 0.02), ("noise 5 %", 0.05), ("ADShift Gaussian noise", 0.18)])
def test_noise(name: str, std: float) -> None:
    noise = _changed(name, _even(0.5)) - 0.5
    assert noise.std() == pytest.approx(std, rel=0.02)
    assert abs(noise.mean()) < 0.02 * std
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.02  # each channel has its own


def test_light_that_varies_from_image_to_image() -> None:
    factors = []
    for seed in range(30):
        ratio = _changed("light varying by 10 %", _image(seed)) / _image(seed).numpy()
        assert np.ptp(ratio) < 1e-5
        factors.append(ratio.mean())
    assert 0.9 <= min(factors) < 0.93
    assert 1.07 < max(factors) <= 1.1


def test_light_that_falls_off() -> None:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    plane = np.stack([rows.ravel() / (HEIGHT - 1), columns.ravel() / (WIDTH - 1), np.ones(rows.size)], axis=1)
    slopes = []
    for seed in range(4):
        ratio = (_changed("light falling off by 15 %", _image(seed)) / _image(seed).numpy()).mean(0)
        assert ratio.max() == pytest.approx(1, abs=1e-5)
        assert ratio.min() == pytest.approx(0.85, abs=1e-5)
        found, residual, *_ = np.linalg.lstsq(plane, ratio.ravel(), rcond=None)
        assert residual[0] / rows.size < 1e-10
        slopes.append(np.arctan2(found[0], found[1]))
    assert np.ptp(slopes) > 0.3


def test_jpeg() -> None:
    image = _image()
    errors = []
    for quality in (90, 60):
        buffer = io.BytesIO()
        Image.fromarray((255 * image.numpy()).round().astype(np.uint8).transpose(1, 2, 0)).save(
            buffer, "JPEG", quality=quality
        )
        expected = np.asarray(Image.open(buffer)).transpose(2, 0, 1) / 255
        changed = _changed(f"JPEG {quality}")
        assert np.abs(changed - expected).mean() < 0.5 / 255
        errors.append(np.abs(changed - image.numpy()).mean())
    assert 0 < errors[0] < errors[1]


def test_shift() -> None:
    image = tv_tensors.Image(torch.rand(3, 200, 300))
    mask = tv_tensors.Mask((torch.rand(200, 300) > 0.5).to(torch.uint8))
    changed, moved = ChangeImages("shift of 1 %")(image, mask)
    torch.testing.assert_close(changed[:, 2:, 3:], image[:, :-2, :-3], atol=1e-4, rtol=0)
    torch.testing.assert_close(changed[:, 0, 3:], image[:, 0, :-3], atol=1e-4, rtol=0)
    assert moved[2:, 3:].equal(mask[:-2, :-3])


def test_rotation() -> None:
    changed, moved = ChangeImages("rotation of 2 degrees")(_image(), _mask())
    options = {"reshape": False, "order": 1, "mode": "nearest"}
    expected = ndimage.rotate(_image().numpy(), -2, axes=(1, 2), **options)
    np.testing.assert_allclose(changed.numpy(), expected, atol=0.02)
    assert np.abs(changed.numpy() - expected).mean() < 1e-3
    expected = ndimage.rotate(_mask().numpy().astype(float), -2, **options) > 0.5
    assert (moved.numpy().astype(bool) == expected).mean() > 0.999
    assert not moved.equal(_mask())


def test_random_numbers_depend_on_change_and_image_alone() -> None:
    random = ("light varying by 10 %", "light falling off by 15 %", "noise 2 %", "noise 5 %", "ADShift Gaussian noise")
    state = torch.random.get_rng_state()
    first = {(name, seed): _changed(name, _image(seed)) for name in random for seed in (0, 1)}
    assert torch.random.get_rng_state().equal(state)
    torch.manual_seed(5)
    for name, seed in reversed(first):
        assert np.array_equal(_changed(name, _image(seed)), first[name, seed])
    for name in random:
        changes = [first[name, seed] - _image(seed).numpy() for seed in (0, 1)]
        assert np.abs(changes[0] - changes[1]).mean() > 1e-3
    assert np.abs(np.corrcoef(*(_changed(name, _even(0.5))[0].ravel() for name in random[2:4]))[0, 1]) < 0.05
