# SPDX-License-Identifier: Apache-2.0

"""The page after a training."""

import html
import logging
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from anomalib_dhkd import Dhkd, Quickstart, RankPreservingPostProcessor, __version__
from anomalib_dhkd.__main__ import DhkdCLI
from tests.helpers import fit, opened, small_dhkd


def _folder(quickstart: Quickstart, root: Path, **changes: Any) -> Folder:
    """Return a data module of the quickstart's images under names that look like tags."""
    quickstart.prepare_data()
    shutil.copytree(quickstart.root / "brick", root)
    arguments = {
        "name": "<b>parts", "root": root, "normal_dir": "train/good", "normal_test_dir": "test/good",
        "abnormal_dir": "test/stain", "mask_dir": "ground_truth/stain", "val_split_mode": "same_as_test",
        "train_batch_size": 4, "num_workers": 0, "seed": 0,
    }  # fmt: skip
    return Folder(**(arguments | changes))


def _train(datamodule: Any, folder: Path, **arguments: Any) -> tuple[Engine, Dhkd]:
    model = small_dhkd(train_steps=4, **arguments)
    engine = Engine(default_root_dir=folder, enable_progress_bar=False)
    engine.train(model=model, datamodule=datamodule)
    return engine, model


def _page(engine: Engine) -> Path:
    return Path(engine.trainer.default_root_dir) / "report.html"


def test_a_whole_page(quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "<i>data").mkdir()
    datamodule = _folder(quickstart, tmp_path / "<i>data" / "parts")
    with caplog.at_level("INFO", logger="anomalib_dhkd"):
        engine, model = _train(datamodule, tmp_path / "a results' folder")
    page = _page(engine)
    assert f"Report: {page}" in caplog.text
    assert re.search(r"Next: anomalib predict .*model.ckpt", caplog.messages[-1])
    assert page.parent == Path(engine.best_model_path).parents[2]
    text = page.read_text()
    assert "<b>" not in text
    assert "<i>" not in text
    assert "DHKD on &lt;b&gt;parts" in text
    assert not re.findall(r"https?:|src=\"(?!data:)", text)
    with opened(page) as driver:
        assert driver.title == "DHKD on <b>parts"
        pictures = driver.find_elements("tag name", "img")
        titles = [picture.get_attribute("alt") for picture in pictures]
        assert titles == [
            "Histogram of the scores", "ROC and PRO curves", "good, best", "good, median", "defective, best",
            "defective, median", "Losses",
        ]  # fmt: skip  # of two images, one is both median and worst
        assert all(int(picture.get_property("naturalWidth")) > 100 for picture in pictures)
        shown = driver.find_element("tag name", "body").text
    for expected in (
        f"anomalib-dhkd {__version__}",
        "of 2 good images are false alarms",
        "of 2 defective images are missed defects",
        "The threshold was chosen on these images.",
        f"image_AUROC {float(engine.trainer.callback_metrics['image_AUROC']):.4f}",
        "train 8 8 0 0 256 x 256 PNG L",
        "Images are resized to 64 x 64 pixels, so that 4.0 pixels become one.",
        "teacher's phase",
        "train_steps 4",
        f"seed {model.seed}",
        str(tmp_path / "<i>data"),
    ):
        assert expected in shown, expected


def test_its_commands_are_those_to_type(quickstart: Quickstart, tmp_path: Path) -> None:
    engine, _ = _train(quickstart, tmp_path / "a results' folder")
    page = html.unescape(_page(engine).read_text())
    image = quickstart.test_data.samples.image_path[0]
    commands = [shlex.split(command) for command in re.findall(r"<pre>(.*?)</pre>", page)]
    parsed = {}
    for command in commands:
        arguments = command[1:] if command[0] == "anomalib" else command[3:]
        assert command[:3] == ["python", "-m", "anomalib_dhkd"] or command[0] == "anomalib"
        arguments = [image if argument in {"IMAGE", "IMAGES"} else argument for argument in arguments]
        line = DhkdCLI(arguments, run=False)
        parsed[line.subcommand] = line.config[line.subcommand]
    assert parsed.keys() == {"predict", "explain", "export", "watch"}
    for subcommand in ("predict", "explain", "export"):
        assert str(parsed[subcommand]["ckpt_path"]) == engine.best_model_path
    assert (
        Path(parsed["watch"]["model"]) == Path(parsed["export"]["export_root"]) / "weights" / "openvino" / "model.xml"
    )


def test_fit_alone(held_out_quickstart: Quickstart, tmp_path: Path) -> None:
    model = small_dhkd(train_steps=4, post_processor=RankPreservingPostProcessor(false_alarm_rate=0.4))
    engine, _ = fit(held_out_quickstart, tmp_path, model)
    text = " ".join(html.unescape(_page(engine).read_text()).split())
    assert "Result on validation images" in text
    assert "The model was not tested." in text
    assert "of 4</strong> good images are false alarms" in text
    assert "The threshold is set for 40 % false alarms." in text
    assert text.count("<img") == 5  # histogram, three good images, losses
    assert "ROC and PRO curves" not in text


def test_good_images_alone_and_no_masks(quickstart: Quickstart, tmp_path: Path) -> None:
    only = {"abnormal_dir": None, "mask_dir": None, "val_split_mode": "from_train", "val_split_ratio": 0.5}
    engine, _ = _train(_folder(quickstart, tmp_path / "good", **only), tmp_path / "one")
    text = _page(engine).read_text()
    assert "Result on test images" in text
    assert "missed defects" not in text
    assert "The threshold was chosen on these images" not in text
    engine, _ = _train(_folder(quickstart, tmp_path / "parts", mask_dir=None), tmp_path / "two")
    text = _page(engine).read_text()
    assert "missed defects" in text
    assert "ROC and PRO curves" in text


@pytest.mark.parametrize("changes", [{"student_blocks": 0}, {"evaluator": False, "post_processor": False}])
def test_models_without_a_part(changes: dict[str, Any], quickstart: Quickstart, tmp_path: Path) -> None:
    engine, _ = _train(quickstart, tmp_path, **changes)
    text = _page(engine).read_text()
    assert "Result on test images" in text
    assert ("false alarms" in text) == ("post_processor" not in changes)
    assert ("image_AUROC" in text) == ("evaluator" not in changes)


def test_data_loaders_of_your_own(quickstart: Quickstart, tmp_path: Path) -> None:
    quickstart.prepare_data()
    quickstart.setup()
    train, val = (
        DataLoader(data, batch_size=4, collate_fn=data.collate_fn)
        for data in (quickstart.train_data, quickstart.val_data)
    )
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    engine.fit(small_dhkd(train_steps=4), train_dataloaders=train, val_dataloaders=val)
    text = _page(engine).read_text()
    assert "The images come from data loaders" in text
    assert "of 2</strong> good images are" in text


class InTheWay(Callback):
    """Makes a folder where the page should be."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        del pl_module  # Unused argument.
        (Path(trainer.default_root_dir) / "report.html").mkdir()


def test_a_page_that_cannot_be_written_is_a_warning(
    quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(default_root_dir=tmp_path, callbacks=[InTheWay()], enable_progress_bar=False)
    with caplog.at_level("WARNING", logger="anomalib_dhkd"):
        (metrics,) = engine.train(model=small_dhkd(train_steps=4), datamodule=quickstart)
    assert "image_AUROC" in metrics
    assert Path(engine.best_model_path).is_file()
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert (
        sum(bool(re.match(r"The report .* isn't written: IsADirectoryError: .*report.html", m)) for m in messages) == 1
    )


def test_what_comes_after_is_on_no_page(quickstart: Quickstart, quickstart_root: Path, tmp_path: Path) -> None:
    engine, model = _train(quickstart, tmp_path)
    page = _page(engine)
    written = page.read_text()
    other = Quickstart(root=quickstart_root, category="gravel", num_train=8, num_test=2, num_workers=0)
    engine.validate(model=model, datamodule=quickstart, verbose=False)
    engine.predict(model=model, data_path=quickstart.test_data.samples.image_path[0])
    Engine(default_root_dir=tmp_path, enable_progress_bar=False).test(model=model, datamodule=other, verbose=False)
    assert page.read_text() == written
    assert list(tmp_path.rglob("report.html")) == [page]
    # The same model tested again on the same data is on it.
    page.unlink()
    engine.test(model=model, datamodule=quickstart, verbose=False)
    assert page.is_file()
    # Another training has a page of its own.
    again = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    again.fit(model=model, datamodule=quickstart)
    assert _page(again) != page
    assert "Result on validation images" in _page(again).read_text()


class Stop(Callback):
    """Ends a training with an error."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 3:
            msg = "disk on fire"
            raise RuntimeError(msg)


def test_a_resumed_training(quickstart: Quickstart, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="disk on fire"):
        fit(quickstart, tmp_path, small_dhkd(train_steps=4), callbacks=[Stop()])
    assert not list(tmp_path.rglob("report.html"))
    (unfinished,) = tmp_path.rglob("unfinished.ckpt")
    model = small_dhkd(train_steps=4)
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    engine.train(model=model, datamodule=quickstart, ckpt_path=unfinished)
    page = _page(engine)
    written = page.read_text()
    assert "The training was resumed from" in written
    assert str(unfinished) in written
    assert "Result on test images" in written
    # A test of another checkpoint isn't on the page.
    other, _ = fit(quickstart, tmp_path / "other", small_dhkd(train_steps=2))
    engine.test(model=model, datamodule=quickstart, ckpt_path=other.best_model_path, verbose=False)
    assert page.read_text() == written


def test_a_trial_leaves_no_page(quickstart: Quickstart, tmp_path: Path) -> None:
    Engine(default_root_dir=tmp_path, fast_dev_run=True).fit(model=small_dhkd(), datamodule=quickstart)
    assert not list(tmp_path.rglob("report.html"))
