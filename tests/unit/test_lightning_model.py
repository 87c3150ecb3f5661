# SPDX-License-Identifier: Apache-2.0

"""Arguments, switches and losses of the Lightning module, in anomalib's real engine."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from anomalib_dhkd import Dhkd, Quickstart
from tests.helpers import fit, small_dhkd


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("width", 0),
        ("flow_steps", -1),
        ("student_blocks", -1),
        ("noise_std", -0.1),
        ("noise_std", float("nan")),
        ("affinity_weight", -1.0),
        ("num_gaussians", 1),
        ("num_gaussians", -2),
        ("image_score", "median"),
        ("num_views", -1),
        ("train_steps", 1),
        ("cache_limit", -1.0),
    ],
)
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must be .*, got {value!r}"):
        Dhkd(**{argument: value})


def test_a_model_needs_teacher_or_student() -> None:
    with pytest.raises(ValueError, match="student_blocks must be above 0 when flow_steps is 0, got 0"):
        Dhkd(flow_steps=0, student_blocks=0)


def test_arguments_are_few() -> None:
    parameters = list(inspect.signature(Dhkd).parameters)
    assert len(parameters) <= 20
    assert parameters[-4:] == ["pre_processor", "post_processor", "evaluator", "visualizer"]


def test_losses_and_phase_are_in_the_progress_bar(quickstart: Quickstart, tmp_path: Path) -> None:
    model = small_dhkd(affinity_weight=1, train_steps=4)
    _, recorder = fit(quickstart, tmp_path, model, enable_progress_bar=True)
    teacher, student = recorder.steps[0]["logged"], recorder.steps[-1]["logged"]
    assert teacher["phase"] == 1
    assert "teacher_loss" in teacher
    assert student["phase"] == 2
    assert {"student_loss", "affinity_loss"} <= set(student)


@pytest.mark.parametrize(
    ("changes", "expected", "absent"),
    [
        ({"flow_steps": 0}, "ssss", "teacher_loss"),
        ({"student_blocks": 0}, "tttt", "student_loss"),
        ({"affinity_weight": 0.0}, "ttss", "affinity_loss"),
    ],
)
def test_switched_off_parts_take_no_part(
    quickstart: Quickstart, tmp_path: Path, changes: dict[str, Any], expected: str, absent: str
) -> None:
    _, recorder = fit(quickstart, tmp_path, small_dhkd(**({"affinity_weight": 1.0} | changes), train_steps=4))
    assert recorder.phases == expected
    assert absent not in {name for step in recorder.steps for name in step["logged"]}


@pytest.mark.parametrize("cache_limit", [2.0, None])
def test_statistics_come_from_all_training_images_and_no_others(
    cache_limit: float | None, quickstart: Quickstart, tmp_path: Path
) -> None:
    model = small_dhkd(train_steps=2, cache_limit=cache_limit, num_views=0)
    fit(quickstart, tmp_path, model)
    images = next(iter(DataLoader(quickstart.train_data, batch_size=8, collate_fn=quickstart.train_data.collate_fn)))
    network = model.eval().model
    with torch.no_grad():
        features = network.features.extract(images.image)
        distances = network.distances(network.respond(network.features.standardise(features)))
    for statistics, feature in zip(network.features.statistics, features, strict=True):
        torch.testing.assert_close(statistics.running_mean, feature.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            statistics.running_var, feature.var(dim=(0, 2, 3), correction=0), rtol=1e-3, atol=1e-3
        )
    for mean, distance in zip(network.anomaly_map_generator.log_mean, distances.values(), strict=True):
        torch.testing.assert_close(mean, distance.log().mean(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("switched_off", ["flow_steps", "student_blocks"])
def test_only_networks_that_exist_have_a_shift(switched_off: str, quickstart: Quickstart, tmp_path: Path) -> None:
    engine, _ = fit(quickstart, tmp_path, small_dhkd(**{switched_off: 0}, train_steps=2))
    (logged,) = engine.test(model=engine.model, datamodule=quickstart, verbose=False)
    assert ("teacher_shift" in logged, "student_shift" in logged) == (
        switched_off == "student_blocks",
        switched_off == "flow_steps",
    )
