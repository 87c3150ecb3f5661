# SPDX-License-Identifier: Apache-2.0

"""The whole network: shapes, switches, gradients."""

from typing import Any

import pytest
import torch

from anomalib_dhkd.components.dual_domain import FrequencyBranch
from anomalib_dhkd.components.positional_encoding import sinusoidal_encoding
from anomalib_dhkd.torch_model import DhkdModel
from tests.conftest import SMALL

ARGUMENTS = {
    "backbone": "efficientnet_lite0_bundled",
    "layers": ["blocks.2", "blocks.4"],
    "pre_trained": True,
    "weights": None,
    "positional_channels": 8,
    "frequency_branch": True,
    "noise_std": 0.5,
    "noise_coverage": 0.5,
    "calibration": True,
    "image_score": "topk",
    **SMALL,
}


def _model(**changes: Any) -> DhkdModel:
    return DhkdModel(**(ARGUMENTS | changes))


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (100, 70)])
def test_any_image_size(size: tuple[int, int]) -> None:
    output = _model().eval()(torch.rand(3, 3, *size))
    assert output.anomaly_map.shape == (3, 1, *size)
    assert output.pred_score.shape == (3, 1)
    assert output.anomaly_map.isfinite().all()


def test_noise_is_on_in_training_and_off_in_evaluation() -> None:
    model = _model()
    features = model.features(torch.rand(2, 3, 64, 64))
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(model.study(features), model.study(features), strict=True))
    model.train()
    assert not any(torch.equal(a, b) for a, b in zip(model.study(features), model.study(features), strict=True))
    silent = _model(noise_std=0.0).train()
    assert all(torch.equal(a, b) for a, b in zip(silent.study(features), silent.study(features), strict=True))


def test_the_teacher_sees_clean_features() -> None:
    model = _model().train()
    features = model.features(torch.rand(2, 3, 64, 64))
    first, second = model.teach(features)[0], model.teach(features)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_flow_the_student_learns_the_features() -> None:
    model = _model(flow_steps=0)
    assert not [name for name, _ in model.named_parameters() if "teacher" in name]
    features = model.features(torch.rand(2, 3, 64, 64))
    latents, log_dets = model.teach(features)
    assert all(torch.equal(a, b) for a, b in zip(latents, features, strict=True))
    assert all((log_det == 0).all() for log_det in log_dets)


def test_without_student_the_map_is_the_teachers() -> None:
    model = _model(student_blocks=0).eval()
    assert not [name for name, _ in model.named_parameters() if "student" in name]
    images = torch.rand(2, 3, 64, 64)
    latents, _ = model.teach(model.features(images))
    responses, predictions = model.respond(images)
    assert all((prediction == 0).all() for prediction in predictions)
    torch.testing.assert_close(responses, latents)
    maps = [latent.square().mean(dim=1, keepdim=True) for latent in latents]
    torch.testing.assert_close(model(images).anomaly_map, model.anomaly_map_generator(maps, (64, 64)).anomaly_map)
    with pytest.raises(RuntimeError, match="no student"):
        model.study(model.features(images))


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
    assert calls


def test_map_is_low_where_the_student_is_right() -> None:
    model = _model().eval()
    images = torch.rand(2, 3, 64, 64)
    model.study = lambda features: model.teach(features)[0]
    perfect = model(images).anomaly_map
    assert perfect.isfinite().all()
    del model.study
    assert (perfect < model(images).anomaly_map).all()
