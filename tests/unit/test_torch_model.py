# SPDX-License-Identifier: Apache-2.0

"""The whole network: shapes, switches, gradients."""

import shutil
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_dhkd.components.dual_domain import FrequencyBranch
from anomalib_dhkd.components.positional_encoding import sinusoidal_encoding
from anomalib_dhkd.torch_model import DhkdModel
from tests.conftest import SMALL

ARGUMENTS = {
    **SMALL,
    "backbone": "efficientnet_lite0_bundled",
    "layers": ["blocks.2", "blocks.4"],
    "pre_trained": True,
    "weights": None,
    "positional_channels": 8,
    "noise_std": 0.5,
    "noise_coverage": 0.5,
    "mixture": 0,
    "calibration": True,
    "image_score": "topk",
}


def _model(**changes: Any) -> DhkdModel:
    return DhkdModel(**(ARGUMENTS | changes))


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (100, 70)])
def test_any_image_size(size: tuple[int, int]) -> None:
    output = _model(mixture=8).eval()(torch.rand(3, 3, *size))
    assert output.anomaly_map.shape == (3, 1, *size)
    assert output.pred_score.shape == (3, 1)
    assert output.anomaly_map.isfinite().all()


def test_noise_is_on_in_training_and_off_in_evaluation() -> None:
    model = _model()
    features = model.features(torch.rand(2, 3, 64, 64))
    model.eval()

    def same(model: DhkdModel) -> list[bool]:
        (_, first), (_, second) = model.respond(features), model.respond(features)
        return [torch.equal(a, b) for a, b in zip(first, second, strict=True)]

    assert same(model) == [True, True]
    assert same(model.train()) == [False, False]
    assert same(_model(noise_std=0.0).train()) == [True, True]


def test_the_teacher_sees_clean_features() -> None:
    model = _model().train()
    features = model.features(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(model.respond(features)[0], model.teach(features)[0], rtol=0, atol=0)


def test_without_flow_the_student_learns_the_features() -> None:
    model = _model(flow_steps=0)
    assert not [name for name, _ in model.named_parameters() if "teacher" in name]
    features = model.features(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(model.respond(features)[0], features, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no teacher"):
        model.teach(features)


def test_without_student_the_map_is_the_teachers() -> None:
    model = _model(student_blocks=0).eval()
    assert not [name for name, _ in model.named_parameters() if "student" in name]
    images = torch.rand(2, 3, 64, 64)
    latents, _ = model.teach(model.features(images))
    responses, predictions = model.respond(model.features(images))
    assert all((prediction == 0).all() for prediction in predictions)
    torch.testing.assert_close(responses, latents)
    maps = [latent.square().mean(dim=1, keepdim=True) for latent in latents]
    torch.testing.assert_close(model(images).anomaly_map, model.anomaly_map_generator(maps, (64, 64)).anomaly_map)


def test_the_mixture_takes_the_place_of_the_coarsest_teacher_and_student() -> None:
    model = _model(mixture=8, calibration=False, image_score="mean").eval()
    assert model.mixture is not None
    images = torch.rand(2, 3, 64, 64)
    features = model.features(images)
    (latent,), (prediction,) = model.respond(features)
    assert latent.shape == prediction.shape == features[0].shape
    fine, coarse = (latent - prediction).square().mean(dim=1, keepdim=True), model.mixture(features)
    torch.testing.assert_close(model.distances(features, [latent], [prediction]), [fine, coarse])
    averaged = 0.4 * fine + 0.6 * F.interpolate(coarse, size=fine.shape[-2:], mode="bicubic")
    output = model(images)
    expected = F.interpolate(averaged, size=(64, 64), mode="bilinear")
    torch.testing.assert_close(output.anomaly_map, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.pred_score, averaged.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)


def test_a_single_scale_has_teacher_student_and_mixture() -> None:
    model = _model(layers=["blocks.4"], mixture=8).eval()
    features = model.features(torch.rand(2, 3, 64, 64))
    assert [distance.shape for distance in model.distances(features, *model.respond(features))] == [(2, 1, 4, 4)] * 2


@pytest.mark.parametrize("mixture", [0, 8])
def test_calibration_on_the_training_images(mixture: int) -> None:
    model = _model(mixture=mixture).train()
    features = model.features(torch.rand(6, 3, 64, 64))
    batches = Mock(return_value=[features])
    model.calibrate(batches)
    assert batches.call_count == (2 if mixture else 1)
    assert model.training
    model.eval()
    logs = [distance.log() for distance in model.distances(features, *model.respond(features))]
    generator = model.anomaly_map_generator
    torch.testing.assert_close(generator.log_mean, torch.stack([log.mean() for log in logs]), rtol=1e-3, atol=1e-3)
    if model.mixture is not None:
        assert model.mixture.means.abs().sum() > 0


def test_without_frequency_branch_no_transform_is_left() -> None:
    assert any(isinstance(module, FrequencyBranch) for module in _model().modules())
    assert not any(isinstance(module, FrequencyBranch) for module in _model(frequency_branch=False).modules())


def test_without_positional_encoding_the_place_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args)
        return sinusoidal_encoding(*args)

    monkeypatch.setattr("anomalib_dhkd.torch_model.sinusoidal_encoding", counted)
    _model(positional_channels=0).eval()(torch.rand(1, 3, 64, 64))
    assert not calls
    _model().eval()(torch.rand(1, 3, 64, 64))
    assert len(calls) == 2  # once a scale, for teacher and student together


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_torch_compile_gives_the_same() -> None:
    model = _model(mixture=8).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected, actual = model(images), torch.compile(model, fullgraph=True)(images)
    torch.testing.assert_close(actual.anomaly_map, expected.anomaly_map, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual.pred_score, expected.pred_score, atol=1e-4, rtol=1e-4)


def test_map_is_low_where_the_student_is_right() -> None:
    model = _model().eval()
    images = torch.rand(2, 3, 64, 64)
    features = model.features(images)
    latents, predictions = model.respond(features)
    perfect = model.score(features, latents, latents, (64, 64)).anomaly_map
    assert perfect.isfinite().all()
    assert (perfect < model.score(features, latents, predictions, (64, 64)).anomaly_map).all()
