# SPDX-License-Identifier: Apache-2.0

"""The documentation as a site: it builds without a warning, and shows without any other server."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import anomalib_dhkd
from tests.helpers import REPOSITORY, browser

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; a broken link, to a page or to a heading, is a warning and thereby an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    completed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    return folder


def test_each_page_is_there_with_what_it_includes(site: Path) -> None:
    pages = {file.relative_to(REPOSITORY / "docs").with_suffix(".html") for file in REPOSITORY.glob("docs/**/*.md")}
    assert {page.relative_to(site) for page in site.rglob("*.html")} == pages | {Path("404.html")}
    assert not [page for page in pages if re.search(r"\{%|:::", (site / page).read_text())]
    for page, words in (("index", "one image costs"), ("use", "How a run ends"), ("method", "stated by the authors")):
        assert words in (site / f"{page}.html").read_text()


def test_python_has_all_that_the_package_exports(site: Path) -> None:
    page = (site / "api.html").read_text()
    for name in anomalib_dhkd.__all__:
        assert f'id="anomalib_dhkd.{name}"' in page
        for argument in set(inspect.signature(getattr(anomalib_dhkd, name)).parameters) - {"args", "kwargs"}:
            assert name == "MVTec" or f"<code>{argument}</code>" in page


def test_in_a_browser(site: Path) -> None:
    """Opened from the folder: no error in the console, and no request to a server."""
    with browser() as driver:
        for page, title in (("index", "anomalib-dhkd"), ("api", "Python - anomalib-dhkd")):
            driver.get((site / f"{page}.html").as_uri())
            assert driver.title == title
            assert driver.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [message for message in messages if message["method"] == "Network.requestWillBeSent"]
    addresses = {message["params"]["request"]["url"] for message in sent}
    assert (site / "pictures" / "gallery.png").as_uri() in addresses
    assert {address.partition(":")[0] for address in addresses} <= {"file", "data"}
