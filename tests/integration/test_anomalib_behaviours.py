# SPDX-License-Identifier: Apache-2.0

"""What anomalib's own tests ask of each of its models: one training, and everything else from its checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from anomalib.models import get_model
from PIL import Image

from anomalib_dhkd import Dhkd
from tests.helpers import openvino_differences

# Tracing the exporters would more than double their time.
pytestmark = pytest.mark.no_cover

SMALL = {"width": 8, "num_gaussians": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a category in MVTec AD's layout: noise, and noise with a square."""
    root = tmp_path_factory.mktemp("mvtecad")
    generator = np.random.default_rng(0)
    for folder, count in (("train/good", 5), ("test/good", 3), ("test/square", 3)):
        for index in range(count):
            image = generator.integers(90, 110, (48, 64, 3), np.uint8)
            mask = np.zeros((48, 64), np.uint8)
            if folder.endswith("square"):
                image[10:30, 20:40] = 250
                mask[10:30, 20:40] = 255
            for kind, pixels, name in (
                (folder, image, f"{index:03}.png"),
                ("ground_truth/square", mask, f"{index:03}_mask.png"),
            ):
                if kind == folder or folder.endswith("square"):
                    path = root / "dummy" / kind / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def datamodule(root: Path) -> MVTecAD:
    return MVTecAD(root, category="dummy", train_batch_size=2, eval_batch_size=2, num_workers=0)


@pytest.fixture(scope="module")
def checkpoint(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a training, at the place where anomalib's tests look for it."""
    folder = tmp_path_factory.mktemp("project")
    datamodule = MVTecAD(root, category="dummy", train_batch_size=2, eval_batch_size=2, num_workers=0)
    model = get_model("dhkd", **SMALL)
    _engine(folder).fit(model=model, datamodule=datamodule)
    return folder / model.name / datamodule.name / "dummy" / "v0" / "weights" / "lightning" / "model.ckpt"


def _engine(folder: Path) -> Engine:
    return Engine(logger=False, default_root_dir=folder, max_epochs=1, devices=1)


def test_test(checkpoint: Path, datamodule: MVTecAD, tmp_path: Path) -> None:
    (metrics,) = _engine(tmp_path).test(model=get_model("dhkd"), datamodule=datamodule, ckpt_path=checkpoint)
    assert metrics["image_AUROC"] == 1
    assert metrics["pixel_AUROC"] > 0.8


def test_train(checkpoint: Path, datamodule: MVTecAD, tmp_path: Path) -> None:
    """A checkpoint of a training that has come to its end is tested as it is."""
    (metrics,) = _engine(tmp_path).train(model=get_model("dhkd", **SMALL), datamodule=datamodule, ckpt_path=checkpoint)
    assert metrics["image_AUROC"] == 1


def test_validate(checkpoint: Path, datamodule: MVTecAD, tmp_path: Path) -> None:
    model = get_model("dhkd")
    _engine(tmp_path).validate(model=model, datamodule=datamodule, ckpt_path=checkpoint)
    expected = Dhkd.load_from_checkpoint(checkpoint).post_processor.image_threshold
    torch.testing.assert_close(model.post_processor.image_threshold, expected)


def test_predict(checkpoint: Path, datamodule: MVTecAD, tmp_path: Path) -> None:
    batches = _engine(tmp_path).predict(model=get_model("dhkd"), ckpt_path=checkpoint, datamodule=datamodule)
    assert [len(batch.image) for batch in batches] == [2, 2, 2]
    good, defective = torch.cat([batch.pred_score for batch in batches]).split(3)
    assert good.max() < 0.5 <= defective.min()


@pytest.mark.parametrize("export_type", list(ExportType))
def test_export(
    export_type: ExportType, checkpoint: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _engine(tmp_path).export(
        model=get_model("dhkd"), ckpt_path=checkpoint, export_type=export_type, export_root=tmp_path
    )
    model = Dhkd.load_from_checkpoint(checkpoint).eval()
    if export_type != ExportType.TORCH:
        scores, maps = openvino_differences(path, model, [torch.rand(3, 320, 320)])
        assert max(scores.max(), maps.max()) <= 1e-3
        return
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(path, device="cpu")
    for name, defective in (("good", False), ("square", True)):
        image = root / "dummy" / "test" / name / "000.png"
        with torch.no_grad():
            prediction = inferencer.predict(image)
            expected = model(torch.from_numpy(np.array(Image.open(image))).movedim(-1, 0)[None] / 255)
        assert bool(prediction.pred_label) == defective
        torch.testing.assert_close(torch.as_tensor(prediction.anomaly_map), expected.anomaly_map.squeeze(1))


@pytest.mark.parametrize("command", ["predict", "test", "validate", "export"])
def test_command_line_takes_the_arguments_from_the_checkpoint(
    command: str, checkpoint: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", "MVTecAD", "--data.root", str(root), "--data.category=dummy", "--data.num_workers=0"]
    rest = {"predict": ["--data", str(root / "dummy" / "test")], "export": ["--export_type=torch"]}.get(command, data)
    AnomalibCLI([command, "--model=anomalib_dhkd.Dhkd", f"--ckpt_path={checkpoint}", *rest])
    expected = {"predict": 6, "test": 6, "validate": 0, "export": 0}[command]
    assert len(list(tmp_path.rglob("*.png"))) == expected
    assert len(list(tmp_path.rglob("model.pt"))) == (command == "export")
    if command != "export":
        with pytest.raises(ValueError, match=r"^width must be 8, as in the checkpoint, got 16; what isn't given"):
            AnomalibCLI([command, "--model=anomalib_dhkd.Dhkd", "--model.width=16", f"--ckpt_path={checkpoint}", *rest])
