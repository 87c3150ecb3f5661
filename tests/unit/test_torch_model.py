# SPDX-License-Identifier: Apache-2.0

"""The whole network: shapes, switches, gradients."""

import shutil
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_dhkd.components.dual_domain import FrequencyBranch
from anomalib_dhkd.components.features import average
from anomalib_dhkd.torch_model import DhkdModel
from tests.helpers import SMALL

ARGUMENTS = {
    **SMALL,
    "backbone": "efficientnet_lite0_bundled",
    "layers": ["blocks.2", "blocks.4"],
    "weights": None,
    "noise_std": 0.5,
    "num_gaussians": 0,
    "image_score": "topk",
}


def _model(**changes: Any) -> DhkdModel:
    return DhkdModel(**(ARGUMENTS | changes))


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (100, 70)])
def test_any_image_size(size: tuple[int, int]) -> None:
    output = _model(num_gaussians=8).eval()(torch.rand(3, 3, *size))
    assert output.anomaly_map.shape == (3, 1, *size)
    assert output.pred_score.shape == (3, 1)
    assert output.anomaly_map.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "shares"),
    [({}, {"coarse": 1.0 - 0.1 / 0.3, "fine": 0.1 / 0.3}), ({"num_gaussians": 8}, {"coarse": 0.5, "fine": 0.5})],
)
def test_the_map_is_the_mean_of_its_halves(changes: dict[str, int], shares: dict[str, float]) -> None:
    model = _model(**changes).eval()
    with torch.no_grad():
        responses = model.respond(model.features(torch.rand(2, 3, 64, 96)))
        halves = model.halves(responses, (64, 96))
        expected = model.score(responses, (64, 96)).anomaly_map
    assert halves.keys() == shares.keys()
    mean = shares["fine"] * halves["fine"] + shares["coarse"] * halves["coarse"]
    torch.testing.assert_close(mean, expected)
    assert not torch.allclose(halves["fine"], halves["coarse"], atol=0.1)


def test_noise_is_on_in_training_and_off_in_evaluation() -> None:
    model = _model()
    features = model.features(torch.rand(2, 3, 64, 64))
    model.eval()

    def same(model: DhkdModel) -> list[bool]:
        first, second = model.respond(features), model.respond(features)
        return [torch.equal(a, b) for a, b in zip(first.student, second.student, strict=True)]

    assert same(model) == [True, True]
    assert same(model.train()) == [False, False]
    assert same(_model(noise_std=0.0).train()) == [True, True]


def test_the_teacher_sees_clean_features() -> None:
    model = _model().train()
    features = model.features(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(model.respond(features).teacher, model.teach(features)[0], rtol=0, atol=0)


def test_without_flow_the_student_learns_the_features_averaged_at_the_coarsest_layer() -> None:
    model = _model(flow_steps=0)
    assert not [name for name, _ in model.named_parameters() if "teacher" in name]
    features = model.features(torch.rand(2, 3, 64, 64))
    expected = [features[0], average(features)[1]]
    torch.testing.assert_close(model.respond(features).teacher, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no teacher"):
        model.teach(features)


def test_without_student_the_map_is_the_teachers() -> None:
    model = _model(student_blocks=0).eval()
    assert not [name for name, _ in model.named_parameters() if "student" in name]
    images = torch.rand(2, 3, 64, 64)
    latents, _ = model.teach(model.features(images))
    responses = model.respond(model.features(images))
    assert all((prediction == 0).all() for prediction in responses.student)
    torch.testing.assert_close(responses.teacher, latents)
    maps = {
        layer: latent.square().mean(dim=1, keepdim=True)
        for layer, latent in zip(["blocks.2", "blocks.4"], latents, strict=True)
    }
    torch.testing.assert_close(model(images).anomaly_map, model.anomaly_map_generator(maps, (64, 64)).anomaly_map)


def test_the_map_is_made_of_networks_and_mixtures() -> None:
    model = _model(num_gaussians=8, image_score="mean").eval()
    images = torch.rand(2, 3, 64, 64)
    features = model.features(images)
    averaged = average(features)
    responses = model.respond(features)
    pairs = zip(responses.teacher, responses.student, strict=True)
    fine, coarse = ((teacher - student).square().mean(dim=1, keepdim=True) for teacher, student in pairs)
    plain, smooth = model.mixtures["mixture"](features), model.mixtures["averaged_mixture"](averaged)
    assert coarse.shape == plain.shape == smooth.shape == (2, 1, 4, 4)
    expected = {"blocks.2": fine, "blocks.4": coarse, "mixture": plain, "averaged_mixture": smooth}
    torch.testing.assert_close(model.distances(responses), expected)
    coarse_part = 0.2 * coarse.log() + 0.4 * plain.log() + 0.3 * smooth.log()
    fused = 0.1 * fine.log() + F.interpolate(coarse_part, size=(8, 8), mode="bicubic")
    output = model(images)
    expected_map = F.interpolate(fused, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(output.anomaly_map, expected_map, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.pred_score, fused.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)


TWO_BACKBONES = {
    "backbone": ["efficientnet_lite0_bundled", "vit_tiny_patch16_224"],
    "layers": [["blocks.2", "blocks.4"], ["blocks.3"]],
    "pre_trained": False,
}


def test_a_second_backbone_has_a_mixture_alone() -> None:
    model = _model(num_gaussians=8, **TWO_BACKBONES).eval()
    features = model.features(torch.rand(2, 3, 64, 64))
    responses = model.respond(features)
    distances = model.distances(responses)
    assert list(distances) == ["blocks.2", "blocks.4", "mixture", "averaged_mixture", "further_mixture"]
    torch.testing.assert_close(distances["further_mixture"], model.mixtures["further_mixture"](features[2:]))
    alone = _model(num_gaussians=8, pre_trained=False).eval()
    for part in ("features", "teachers", "students", "mixtures"):
        getattr(alone, part).load_state_dict(getattr(model, part).state_dict(), strict=False)
    first = alone.distances(alone.respond(features[:2]))
    torch.testing.assert_close({name: distances[name] for name in first}, first)
    moved = model.distances(model.respond([*features[:2], features[2] + 1]))
    assert [name for name in moved if not torch.equal(moved[name], distances[name])] == ["further_mixture"]
    assert model.anomaly_map_generator.weights["further_mixture"] == pytest.approx(0.4 / 1.4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            TWO_BACKBONES,
            r"backbone must be one name when num_gaussians is 0, got \['efficientnet_lite0_bundled', 'vit_",
        ),
        ({"backbone": [], "num_gaussians": 8}, r"backbone must be one name or two, got \[\]"),
        ({"backbone": ["resnet18"] * 3, "num_gaussians": 8}, r"backbone must be one name or two, got \['resnet18', "),
    ],
)
def test_numbers_of_backbones_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model(**changes)


def test_a_single_scale_has_teacher_student_and_mixtures() -> None:
    model = _model(layers=["blocks.4"], num_gaussians=8).eval()
    features = model.features(torch.rand(2, 3, 64, 64))
    shapes = {name: distance.shape for name, distance in model.distances(model.respond(features)).items()}
    assert shapes == dict.fromkeys(("blocks.4", "mixture", "averaged_mixture"), (2, 1, 4, 4))


@pytest.mark.parametrize("num_gaussians", [0, 8])
def test_calibration_on_the_training_images(num_gaussians: int) -> None:
    model = _model(num_gaussians=num_gaussians).train()
    features = model.features(torch.rand(6, 3, 64, 64))
    model.calibrate(lambda: [features])
    assert model.training
    model.eval()
    logs = [distance.log() for distance in model.distances(model.respond(features)).values()]
    generator = model.anomaly_map_generator
    torch.testing.assert_close(generator.log_mean, torch.stack([log.mean() for log in logs]), rtol=1e-3, atol=1e-3)
    for mixture in model.mixtures.values():
        assert mixture.means.abs().sum() > 0


def test_without_frequency_branch_no_transform_is_left() -> None:
    assert any(isinstance(module, FrequencyBranch) for module in _model().modules())
    assert not any(isinstance(module, FrequencyBranch) for module in _model(frequency_branch=False).modules())


def test_the_place_matters() -> None:
    model = _model().eval()
    features = [torch.ones(1, 40, 8, 8), torch.ones(1, 112, 4, 4)]
    for response in model.respond(features).student:
        # Far from the borders the features are the same everywhere; only the encoding of the place differs.
        assert response[0, :, 2:-2, 2:-2].flatten(1).std(dim=1).max() > 1e-3 or response.shape[-1] == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_torch_compile_gives_the_same() -> None:
    model = _model(num_gaussians=8).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, actual = model(images), torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(actual.anomaly_map, expected.anomaly_map, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual.pred_score, expected.pred_score, atol=1e-4, rtol=1e-4)


def test_map_is_low_where_the_student_is_right() -> None:
    model = _model().eval()
    images = torch.rand(2, 3, 64, 64)
    features = model.features(images)
    responses = model.respond(features)
    perfect = model.score(responses._replace(student=responses.teacher), (64, 64)).anomaly_map
    assert perfect.isfinite().all()
    assert (perfect < model.score(responses, (64, 64)).anomaly_map).all()
