# SPDX-License-Identifier: Apache-2.0

"""anomalib's engine, command line and exporters on the quickstart data."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from PIL import Image

from anomalib_dhkd import Dhkd, Quickstart
from tests.conftest import SMALL

Trained = tuple[Engine, Dhkd, Quickstart]


def _images(datamodule: Quickstart) -> torch.Tensor:
    return torch.stack([item.image for item in datamodule.test_data])


def test_checkpoint_restores_the_model(trained: Trained) -> None:
    engine, model, datamodule = trained
    restored = Dhkd.load_from_checkpoint(engine.best_model_path).eval()
    images = _images(datamodule)[:4]
    with torch.no_grad():
        expected, actual = model.eval()(images), restored(images)
    torch.testing.assert_close(actual.pred_score, expected.pred_score)
    torch.testing.assert_close(actual.anomaly_map, expected.anomaly_map)
    assert (expected.anomaly_map != expected.anomaly_map[0]).any()


def test_openvino_export_agrees_with_torch(trained: Trained, tmp_path: Path) -> None:
    engine, model, datamodule = trained
    path = engine.export(model, ExportType.OPENVINO, export_root=tmp_path, input_size=(256, 256))
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    model.eval()
    for image in _images(datamodule):
        with torch.no_grad():
            expected = model(image[None])
        outputs = compiled(image[None].numpy())
        for name in ("pred_score", "anomaly_map"):
            np.testing.assert_allclose(outputs[name], getattr(expected, name).numpy(), atol=1e-3, rtol=0)


def test_openvino_inferencer(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the inferencer leaves a cache in the working directory
    engine, model, datamodule = trained
    path = engine.export(model, ExportType.OPENVINO, export_root=tmp_path)
    image_path = datamodule.test_data.samples.image_path[0]
    prediction = OpenVINOInferencer(path).predict(image_path)
    assert prediction.anomaly_map.squeeze().shape == (256, 256)
    assert 0 <= float(prediction.pred_score.squeeze()) <= 1


def test_predict_one_image_and_a_folder(trained: Trained) -> None:
    engine, model, datamodule = trained
    folder = datamodule.root / "brick" / "test" / "stain"
    for path, count in ((folder / "000.png", 1), (folder, 2)):
        batches = engine.predict(model=model, data_path=path)
        assert sum(len(batch.image) for batch in batches) == count
        assert all(isinstance(batch, ImageBatch) and batch.anomaly_map.isfinite().all() for batch in batches)


@pytest.mark.parametrize("size", [(128, 192)])
def test_other_image_sizes(quickstart: Quickstart, tmp_path: Path, size: tuple[int, int]) -> None:
    model = Dhkd(**SMALL, train_steps=2, pre_processor=Dhkd.configure_pre_processor(size))
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    engine.fit(model=model, datamodule=quickstart)
    with torch.no_grad():
        assert model.eval()(torch.rand(1, 3, 300, 300)).anomaly_map.shape == (1, 1, *size)
    # The size is the pre-processor's, which the checkpoint carries.
    restored = Dhkd.load_from_checkpoint(engine.best_model_path).eval()
    with torch.no_grad():
        assert restored(torch.rand(1, 3, 300, 300)).anomaly_map.shape == (1, 1, *size)


def test_command_line(quickstart_root: Path, tmp_path: Path) -> None:
    """Train, export and predict as the README says, by import path, with nothing imported beforehand."""

    def anomalib(*arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("anomalib")), *arguments]
        completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
        assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]

    model = ["--model", "anomalib_dhkd.Dhkd", *(f"--model.{key}={value}" for key, value in SMALL.items())]
    data = ["--data", "Quickstart", "--data.root", str(quickstart_root), "--data.num_train=8", "--data.num_test=2"]
    anomalib("train", *model, "--model.train_steps=4", *data)
    results = tmp_path / "results" / "Dhkd" / "Quickstart" / "brick" / "latest"
    checkpoint = results / "weights" / "lightning" / "model.ckpt"
    assert checkpoint.is_file()
    assert len(list((results / "images").rglob("*.png"))) == 12

    anomalib("export", *model, "--export_type", "openvino", "--ckpt_path", str(checkpoint))
    assert len(list(tmp_path.rglob("model.xml"))) == 1

    image = next(quickstart_root.rglob("test/dent/000.png"))
    for path, expected in ((image, ["000.png"]), (image.parent, ["000.png", "001.png"])):
        folder = tmp_path / f"predicted_{len(expected)}"
        anomalib(
            "predict",
            *model,
            "--ckpt_path",
            str(checkpoint),
            "--data",
            str(path),
            "--default_root_dir",
            str(folder),
        )
        written = sorted(folder.rglob("images/**/*.png"))
        assert [file.name for file in written] == expected
        assert all(np.asarray(Image.open(file)).std() > 1 for file in written)


def test_help_is_readable(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "anomalib_dhkd", "train", "--model", "Dhkd"]
    config = subprocess.run(
        [*command, "--data", "MVTec", "--print_config"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert config.returncode == 0, config.stderr[-2000:]
    for line in ("class_path: anomalib_dhkd.Dhkd", "class_path: anomalib_dhkd.MVTec", "noise_std:", "train_steps:"):
        assert line in config.stdout
    help_text = subprocess.run(
        [sys.executable, "-m", "anomalib_dhkd", "train", "--model.help", "anomalib_dhkd.Dhkd"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for words in ("--model.flow_steps", "Coupling blocks of the normalising-flow teacher", "{mean,max,topk}"):
        assert words in help_text
