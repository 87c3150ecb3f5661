# SPDX-License-Identifier: Apache-2.0

"""Every file in configs/ through the parser of the command that it is for."""

import inspect
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI

from anomalib_dhkd import Dhkd
from anomalib_dhkd.benchmark.jobs import TrainingJobGenerator
from anomalib_dhkd.benchmark.pipeline import Benchmark
from anomalib_dhkd.benchmark.work import parse
from tests.helpers import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs" / "model").glob("*.yaml"))
BENCHMARKS = sorted((REPOSITORY / "configs" / "benchmark").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert {"dhkd.yaml", "quickstart.yaml", "mvtec.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_instantiates(path: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    backbone = config["model"].get("init_args", {}).get("backbone", "efficientnet_lite0_bundled")
    arguments = ["train", "--config", str(path), "--default_root_dir", str(tmp_path)]
    if "data" not in config:
        arguments += ["--data", "MVTec"]
    names = [backbone] if isinstance(backbone, str) else backbone
    weights = [None if name.endswith("_bundled") else str(tmp_path / f"{name}.pth") for name in names]
    for name, file in zip(names, weights, strict=True):
        if file:
            torch.save(timm.create_model(name, pretrained=False).state_dict(), file)
    arguments += ["--model.init_args.weights", json.dumps(weights[0] if isinstance(backbone, str) else weights)]
    cli = AnomalibCLI(arguments, run=False)
    assert isinstance(cli.model, Dhkd)
    assert cli.model.hparams["backbone"] == backbone
    height, width = cli.model.input_size
    assert min(height, width) >= 224
    assert cli.datamodule is not None


def test_dhkd_yaml_lists_all_defaults() -> None:
    written = yaml.safe_load((REPOSITORY / "configs" / "model" / "dhkd.yaml").read_text())["model"]["init_args"]
    defaults = {name: p.default for name, p in inspect.signature(Dhkd.__init__).parameters.items() if name != "self"}
    defaults["layers"] = list(defaults["layers"])
    assert list(written.items()) == list(defaults.items())


@pytest.mark.parametrize("preset", ["paper", "accurate"])
def test_a_preset_is_measured_as_it_is_trained(preset: str) -> None:
    trained, measured = (
        yaml.safe_load((REPOSITORY / "configs" / name / f"{preset}.yaml").read_text())
        for name in ("model", "benchmark")
    )
    rows = {model["name"]: model.get("init_args") for model in measured["benchmark"]["model"]["grid"]}
    assert rows[preset] == trained["model"]["init_args"]


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_jobs_of_a_benchmark_parse(path: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    jobs = list(TrainingJobGenerator(tmp_path, "cpu")(config["benchmark"]))
    names = [model["name"] for model in config["benchmark"]["model"]["grid"]]
    assert {job.settings["model"]["name"] for job in jobs} == set(names)
    assert len({job.folder for job in jobs}) == len(jobs) >= (1 if path.stem == "speed" else 3) * len(names)
    for job in jobs[: len(names)]:
        parse(job.settings)


def test_a_model_of_a_benchmark_may_have_its_own_image_size(tmp_path: Path) -> None:
    config = yaml.safe_load((REPOSITORY / "configs" / "benchmark" / "tuning.yaml").read_text())
    sizes = {
        job.settings["model"]["name"]: job.settings["image_size"]
        for job in TrainingJobGenerator(tmp_path, "cpu")(config["benchmark"])
    }
    assert (sizes.pop("256 px"), sizes.pop("384 px")) == (256, 384)
    assert set(sizes.values()) == {config["benchmark"]["image_size"]}


def test_each_entry_of_data_has_its_own_root_and_grid(tmp_path: Path) -> None:
    arguments = ["--config", str(REPOSITORY / "configs" / "benchmark" / "robustness.yaml"), "--root"]
    parser = Benchmark.get_parser()
    settings = Benchmark()._get_args(parser.parse_args([*arguments, "mvtec", "aitex"]))
    jobs = list(TrainingJobGenerator(tmp_path, "cpu")(settings["benchmark"]))
    found = {tuple(job.settings["data"]["init_args"][key] for key in ("root", "category")) for job in jobs}
    fabrics = {("aitex", "fabric_01"), ("aitex", "fabric_02")}
    assert found == fabrics | {("mvtec", category) for category in ("bottle", "grid", "screw", "transistor")}
    assert len({job.folder for job in jobs}) == len(jobs) == 7 * 6
    message = "root must be 2 folder(s), one for each entry of data, got ['mvtec']"
    with pytest.raises(ValueError, match=re.escape(message)):
        Benchmark()._get_args(parser.parse_args([*arguments, "mvtec"]))


def test_parsing_leaves_the_settings_as_they_are(tmp_path: Path) -> None:
    """Some have classes in lists, which jsonargparse replaces in place."""
    config = yaml.safe_load((REPOSITORY / "configs" / "benchmark" / "robustness.yaml").read_text())
    jobs = {job.settings["name"]: job for job in TrainingJobGenerator(tmp_path, "cpu")(config["benchmark"])}
    settings = jobs["MHPatchcore"].settings
    before = yaml.safe_dump(settings)
    parse(settings)
    assert yaml.safe_dump(settings) == before
