# SPDX-License-Identifier: Apache-2.0

"""The subcommand ``config``."""

import pytest

from anomalib_dhkd.__main__ import DhkdCLI
from anomalib_dhkd.configurations import configurations
from tests.helpers import REPOSITORY


def test_each_file_has_a_name() -> None:
    files = (REPOSITORY / "configs").glob("*/*.yaml")
    names = {str(file.relative_to(REPOSITORY / "configs").with_suffix("")).removeprefix("model/") for file in files}
    assert set(configurations()) == names
    assert {"quickstart", "false_alarm_rate", "benchmark/quickstart"} <= names


@pytest.mark.parametrize("name", ["quickstart", "benchmark/quickstart"])
def test_a_configuration_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        DhkdCLI(["config", name])
    assert not ended.value.code
    folder = "" if "/" in name else "model/"
    assert capsys.readouterr().out == (REPOSITORY / "configs" / f"{folder}{name}.yaml").read_text()


def test_without_a_name_all_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        DhkdCLI(["config"])
    assert not ended.value.code
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(lines) == list(configurations())
    for name, line in lines.items():
        assert line.endswith("."), f"The first line of {name} must be a whole sentence."
        assert line in configurations()[name].read_text()


def test_an_unknown_name_is_an_error_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        DhkdCLI(["config", "quick"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert "argument name: invalid choice: 'quick'" in message
    assert all(name in message for name in configurations())
