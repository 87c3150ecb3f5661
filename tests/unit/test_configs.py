# SPDX-License-Identifier: Apache-2.0

"""Every file in configs/ through anomalib's own command line parser."""

import inspect
from pathlib import Path

import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI

from anomalib_dhkd import Dhkd
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert {"dhkd.yaml", "quickstart.yaml", "mvtec.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_and_instantiates(path: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    needs_hub = "bundled" not in config["model"].get("init_args", {}).get("backbone", "bundled")
    arguments = ["train", "--config", str(path), "--default_root_dir", str(tmp_path)]
    if "data" not in config:
        arguments += ["--data", "MVTec"]
    if needs_hub:
        arguments += ["--model.init_args.pre_trained", "false"]
    cli = AnomalibCLI(arguments, run=False)
    assert isinstance(cli.model, Dhkd)
    height, width = cli.model.input_size
    assert min(height, width) >= 224
    assert cli.datamodule is not None


def test_dhkd_yaml_lists_all_defaults() -> None:
    written = yaml.safe_load((REPOSITORY / "configs" / "dhkd.yaml").read_text())["model"]["init_args"]
    defaults = {name: p.default for name, p in inspect.signature(Dhkd.__init__).parameters.items() if name != "self"}
    defaults["layers"] = list(defaults["layers"])
    assert written == defaults
