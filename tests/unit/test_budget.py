# SPDX-License-Identifier: Apache-2.0

"""Steps, phases and learning rates within the trainer's limits, in anomalib's real engine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_dhkd import Quickstart
from anomalib_dhkd.budget import Budget, learning_rate_factor
from tests.helpers import fit, small_dhkd


@pytest.mark.parametrize(
    ("train_steps", "trainer", "expected"),
    [
        (6, {}, "tttsss"),
        (5, {}, "tttsss"),  # rounded up to whole epochs of two batches
        (6, {"max_epochs": 100}, "tttsss"),
        (6, {"max_epochs": -1}, "tttsss"),
        (6, {"max_steps": 100}, "tttsss"),
        (1000, {"max_epochs": 1}, "ts"),
        (1000, {"max_steps": 3}, "tts"),
        (1000, {"max_epochs": 2, "limit_train_batches": 1}, "ts"),
        (1000, {"max_epochs": 2, "accumulate_grad_batches": 2}, "ts"),
    ],
)
def test_budget(
    quickstart: Quickstart, tmp_path: Path, train_steps: int, trainer: dict[str, Any], expected: str
) -> None:
    engine, recorder = fit(quickstart, tmp_path, small_dhkd(train_steps=train_steps), **trainer)
    assert recorder.phases == expected
    assert engine.trainer.global_step == len(expected)
    # What the progress bar counts up to is where training ended.
    assert engine.trainer.max_epochs == engine.trainer.current_epoch
    # Whatever ended the run, the last weights were validated and saved, once.
    assert recorder.validations == [len(expected)]
    assert torch.load(engine.best_model_path, weights_only=True)["global_step"] == len(expected)
    assert engine.model.finished


def test_each_phase_trains_one_network_only(quickstart: Quickstart, tmp_path: Path) -> None:
    _, recorder = fit(quickstart, tmp_path, small_dhkd(train_steps=8))
    assert [step["teacher"] for step in recorder.steps] == [True] * 4 + [False] * 4
    assert [step["student"] for step in recorder.steps] == [False] * 4 + [True] * 4
    rates = [step["rates"][step["phase"] == "student"] for step in recorder.steps]
    assert all(0 < rate <= 1e-2 for rate in rates)


def test_learning_rate_rises_and_falls_within_a_phase() -> None:
    factors = [learning_rate_factor(step, first=100, last=200) for step in range(300)]
    assert all(factor == 0 for factor in factors[:100])
    assert max(range(300), key=factors.__getitem__) == 109  # after a tenth of the phase
    assert 0.9 < max(factors) <= 1
    assert factors[100] < factors[105] < factors[109] > factors[150] > factors[199] > 0
    assert factors[200:] == pytest.approx([0] * 100)


def test_what_is_left_of_a_budget_that_was_cut() -> None:
    budget = Budget(teacher_steps=4, student_steps=6)
    assert (budget.cut(3), budget.cut(7)) == (Budget(3, 0), Budget(4, 3))
    assert budget.describe(4) == "step 4 of 10, in the teacher's phase"
    assert budget.describe(5) == "step 5 of 10, in the student's phase"


def test_too_few_steps(quickstart: Quickstart, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_steps=1 .* leave 1 step.* needs at least 2"):
        fit(quickstart, tmp_path, small_dhkd(), max_steps=1)


def test_fast_dev_run(quickstart: Quickstart, tmp_path: Path) -> None:
    engine, recorder = fit(quickstart, tmp_path, small_dhkd(), fast_dev_run=2)
    assert recorder.phases == "ts"
    assert recorder.validations == [2]
    assert not list(tmp_path.rglob("*.ckpt"))
    assert fit(quickstart, tmp_path, small_dhkd(), fast_dev_run=True)[1].phases == "t"
    assert engine.trainer.global_step == 2
