# SPDX-License-Identifier: Apache-2.0

"""What importing the package makes known to anomalib."""

import subprocess
import sys

import pytest
from anomalib.models import get_model, list_models

import anomalib_dhkd
from anomalib_dhkd import Dhkd


@pytest.mark.parametrize(
    "spec",
    ["dhkd", "Dhkd", {"class_path": "anomalib_dhkd.Dhkd", "init_args": {"backbone": "efficientnet_lite0_bundled"}}],
)
def test_get_model(spec: str | dict) -> None:
    model = get_model(spec, width=8)
    assert isinstance(model, Dhkd)
    assert model.hparams["width"] == 8


def test_list_models() -> None:
    assert "dhkd" in list_models()
    assert "Dhkd" in list_models(case="pascal")


def test_without_the_import_anomalib_is_untouched() -> None:
    code = "import anomalib.models as m; print(sorted(m.ALLOWED_MODULES), 'dhkd' in m.list_models())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "anomalib_dhkd" not in output
    assert output.strip().endswith("False")


def test_mvtec_is_anomalibs() -> None:
    datamodule = anomalib_dhkd.MVTec(category="grid")
    assert isinstance(datamodule, anomalib_dhkd.data.mvtec.MVTecAD)
    assert datamodule.category == "grid"
