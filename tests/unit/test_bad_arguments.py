# SPDX-License-Identifier: Apache-2.0

"""Any configuration is accepted and works, or is refused with an error that names the argument and its value."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.deploy import ExportType
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from anomalib_dhkd import Dhkd, Quickstart
from tests.helpers import fit, openvino_differences, small_dhkd

QUICK = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LEAST = {
    "width": 1,
    "flow_steps": 0,
    "student_blocks": 0,
    "noise_std": 0,
    "affinity_weight": 0,
    "num_views": 0,
    "train_steps": 2,
    "cache_limit": 0,
}
WHOLE = {"width", "flow_steps", "student_blocks", "num_gaussians", "num_views", "train_steps"}
WRONG = {
    **{name: ["many", 1.5, None, [1]] for name in sorted(WHOLE)},
    "noise_std": ["much", None],
    "affinity_weight": ["much", None],
    "cache_limit": ["much", [1]],
    "frequency_branch": ["perhaps", 2.5, None],
    "image_score": ["median", None, 3],
    "layers": [3, None],
    "backbone": [["a"], None],
    "post_processor": ["none.Such"],
}


@settings(QUICK, max_examples=50)
@given(st.data())
def test_numbers_out_of_range_are_named(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(LEAST)))
    below = st.integers(max_value=LEAST[name] - 1)
    value = data.draw(
        below if name in WHOLE else st.floats(max_value=LEAST[name], exclude_max=True) | st.just(torch.nan)
    )
    assume(value != LEAST[name])
    with pytest.raises(ValueError, match=rf"^{name} must be at least {LEAST[name]}\D.*got {re.escape(repr(value))}"):
        Dhkd(**{name: value})


def _parse(folder: Path, arguments: dict[str, Any]) -> Dhkd:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"model": {"class_path": "anomalib_dhkd.Dhkd", "init_args": arguments}}))
    command = ["train", "--config", str(config), "--data", "Quickstart", "--default_root_dir", str(folder)]
    return AnomalibCLI(command, run=False).model


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_types_in_yaml_are_named(
    name: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The command line's parser exits; our own errors come when the model is made.
    with pytest.raises((SystemExit, ValueError)) as caught:
        _parse(tmp_path, {name: value})
    error = str(caught.value) + capsys.readouterr().err
    assert re.search(rf"\b{name}\b.*{re.escape(str(value))}", error, re.DOTALL)
    if value is None:
        assert re.search(rf"{name} must be of type .*, got None", error)


@QUICK
@given(key=st.from_regex(r"[a-z]{1,8}_[a-z]{1,8}", fullmatch=True))
def test_unknown_keys_in_yaml_are_named(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assume(key not in {*LEAST, *WRONG, "view_transform", "pre_processor"})
    with pytest.raises(SystemExit):
        _parse(tmp_path, {key: 1})
    assert key in capsys.readouterr().err


def test_missing_files_are_named(quickstart: Quickstart, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no/weights\.pth"):
        fit(quickstart, tmp_path, small_dhkd(weights="no/weights.pth"))
    with pytest.raises(SystemExit):
        AnomalibCLI(["train", "--config", str(tmp_path / "none.yaml")], run=False)


@pytest.mark.slow
@pytest.mark.no_cover  # tracing the exporters would double their time
@QUICK
@given(
    flow_steps=st.integers(0, 3),
    student_blocks=st.integers(0, 2),
    width=st.integers(1, 9),
    frequency_branch=st.booleans(),
    noise_std=st.sampled_from([0.0, 0.2]),
    affinity_weight=st.sampled_from([0.0, 1.0]),
    num_gaussians=st.sampled_from([0, 2, 20]),
    image_score=st.sampled_from(["mean", "max", "topk", "contrast"]),
    num_views=st.integers(0, 2),
    cache_limit=st.sampled_from([None, 0.0, 2.0]),
)
def test_what_is_accepted_trains_scores_and_exports(
    quickstart: Quickstart, tmp_path_factory: pytest.TempPathFactory, **arguments: Any
) -> None:
    assume(arguments["flow_steps"] or arguments["student_blocks"])
    model = small_dhkd(**arguments, train_steps=2)
    folder = tmp_path_factory.mktemp("results")
    engine, _ = fit(quickstart, folder, model)
    (logged,) = engine.test(model=model, datamodule=quickstart, verbose=False)
    assert model.finished
    assert 0 <= logged["image_AUROC"] <= 1
    restored = Dhkd.load_from_checkpoint(engine.best_model_path).eval()
    assert restored.post_processor.image_threshold.isfinite()
    path: Any = engine.export(restored, ExportType.OPENVINO, export_root=folder)
    images = (quickstart.test_data[index].image for index in (0, 6))
    scores, maps = openvino_differences(path, restored, images)
    assert scores.max() < 1e-3
    assert np.quantile(maps, 0.999) < 5e-3
