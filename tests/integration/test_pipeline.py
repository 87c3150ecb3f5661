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
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUPRO
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from anomalib_dhkd import Dhkd, Quickstart
from tests.helpers import SMALL, Trained, anomalib, fit, openvino_differences, small_dhkd

# Tracing the exporters would more than double their time.
pytestmark = pytest.mark.no_cover


def _images(datamodule: Quickstart) -> torch.Tensor:
    return torch.stack([item.image for item in datamodule.test_data])


@pytest.fixture(scope="module")
def exported(trained_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[ExportType, Path]:
    """Files of the trained model by their type; an export takes as long as some trainings."""
    folder = tmp_path_factory.mktemp("exported")
    engine, model = Engine(default_root_dir=folder), Dhkd.load_from_checkpoint(trained_checkpoint).eval()
    return {each: engine.export(model, each, export_root=folder) for each in (ExportType.ONNX, ExportType.OPENVINO)}


@pytest.mark.parametrize("export_type", [ExportType.ONNX, ExportType.OPENVINO])
def test_export_agrees_with_torch(export_type: ExportType, exported: dict[ExportType, Path], trained: Trained) -> None:
    scores, maps = openvino_differences(exported[export_type], trained.model, _images(trained.datamodule))
    assert max(scores.max(), maps.max()) <= 1e-3


def _rows(convolution: ov.Node) -> int:
    return convolution.get_output_partial_shape(0)[2].get_length()


@pytest.mark.parametrize(
    "compression_type", [CompressionType.INT8_PTQ, pytest.param(CompressionType.INT8_ACQ, marks=pytest.mark.slow)]
)
def test_int8_quantises_dense_convolutions_and_keeps_scores_and_maps(
    compression_type: CompressionType, trained: Trained, tmp_path: Path
) -> None:
    engine, model, datamodule, _ = trained
    int8 = {"compression_type": compression_type, "datamodule": datamodule}
    path = engine.export(model, ExportType.OPENVINO, tmp_path, "int8", **int8)
    assert path == tmp_path / "weights" / "openvino" / "int8.xml"
    exported = ov.Core().read_model(path)
    convolutions = [each for each in exported.get_ops() if each.get_type_name() == "Convolution"]
    finest = max(_rows(convolution) for convolution in convolutions)
    quantised = [
        target.get_node()
        for operation in exported.get_ops()
        if operation.get_type_name() == "FakeQuantize"
        for target in operation.output(0).get_target_inputs()
    ]
    assert {node.get_type_name() for node in quantised} == {"Convolution"}
    assert max(_rows(node) for node in quantised) < finest / 2
    compiled = ov.Core().compile_model(exported, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = _images(datamodule)
    with torch.no_grad():
        expected = model.eval()(images)
    outputs = [compiled(image[None].numpy()) for image in images]
    maps = np.stack([output["anomaly_map"][0] for output in outputs])
    scores = np.stack([output["pred_score"][0] for output in outputs])
    # With the finest convolutions quantised 0.97 and 0.03, with every operation 0.5.
    assert np.corrcoef(maps.ravel(), expected.anomaly_map.numpy().ravel())[0, 1] > 0.99
    assert np.abs(scores - expected.pred_score.numpy()).mean() < 0.01


def test_int8_needs_data(trained: Trained, tmp_path: Path) -> None:
    engine, model, *_ = trained
    with pytest.raises(ValueError, match="datamodule must be given for compression_type INT8_PTQ, got None"):
        engine.export(model, ExportType.OPENVINO, tmp_path, compression_type=CompressionType.INT8_PTQ)
    assert not list(tmp_path.rglob("*.xml"))


def test_false_alarm_threshold_and_sensitivity_are_exported(trained: Trained, tmp_path: Path) -> None:
    engine, restored, datamodule, _ = trained
    images = _images(datamodule)
    with torch.no_grad():
        raw = restored.model(restored.pre_processor(images))
    restored.post_processor.false_alarm_rate = 0.5
    restored.post_processor.normal_image_scores = raw.pred_score.flatten().sort().values.tolist()
    restored.post_processor.normal_pixel_scores = raw.anomaly_map.flatten(1).amax(dim=1).sort().values.tolist()
    restored.post_processor.image_sensitivity = 0.4
    path = engine.export(restored, ExportType.OPENVINO, export_root=tmp_path)
    scores, maps = openvino_differences(path, restored, images)
    assert max(scores.max(), maps.max()) <= 1e-3
    with torch.no_grad():
        expected = restored(images)
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    labels = [bool(compiled(image[None].numpy())["pred_label"]) for image in images]
    assert labels == expected.pred_label.flatten().tolist()
    # The threshold is the 7th of 12 scores, hence 5 are above 0.5 and fewer above the 0.6 of the sensitivity.
    assert sum(labels) < (expected.pred_score > 0.5).sum() == 5


def test_openvino_inferencer(
    exported: dict[ExportType, Path], trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the inferencer leaves a cache in the working directory
    image_path = trained.datamodule.test_data.samples.image_path[0]
    prediction = OpenVINOInferencer(exported[ExportType.OPENVINO]).predict(image_path)
    assert prediction.anomaly_map.squeeze().shape == (320, 320)
    assert 0 <= float(prediction.pred_score.squeeze()) <= 1


def test_predict_one_image_and_a_folder(trained: Trained) -> None:
    engine, model, datamodule, _ = trained
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
    model = ["--model", "anomalib_dhkd.Dhkd", *(f"--model.{key}={value}" for key, value in SMALL.items())]
    data = ["--data", "Quickstart", "--data.root", str(quickstart_root), "--data.num_train=8", "--data.num_test=2"]
    anomalib(tmp_path, "train", *model, "--model.train_steps=4", *data)
    results = tmp_path / "results" / "Dhkd" / "Quickstart" / "brick" / "latest"
    checkpoint = results / "weights" / "lightning" / "model.ckpt"
    assert checkpoint.is_file()
    assert len(list((results / "images").rglob("*.png"))) == 12

    # The checkpoint knows the arguments.
    loaded = ["--model", "anomalib_dhkd.Dhkd", "--ckpt_path", str(checkpoint)]
    anomalib(tmp_path, "export", *loaded, "--export_type", "openvino")
    assert len(list(tmp_path.rglob("model.xml"))) == 1

    image = next(quickstart_root.rglob("test/dent/000.png"))
    for path, expected in ((image, ["000.png"]), (image.parent, ["000.png", "001.png"])):
        folder = tmp_path / f"predicted_{len(expected)}"
        anomalib(tmp_path, "predict", *loaded, "--data", str(path), "--default_root_dir", str(folder))
        written = sorted(folder.rglob("images/**/*.png"))
        assert [file.name for file in written] == expected
        assert all(np.asarray(Image.open(file)).std() > 1 for file in written)


def test_mixed_precision(quickstart: Quickstart, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="anomalib_dhkd"):
        engine, recorder = fit(quickstart, tmp_path, small_dhkd(train_steps=8), precision="bf16-mixed")
    assert "DHKD trains for 8 steps (4 epochs)" in caplog.text
    assert recorder.phases == "ttttssss"
    checkpoint = torch.load(engine.best_model_path, weights_only=True)
    assert checkpoint["global_step"] == 8
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.slow
def test_several_devices(quickstart_root: Path, tmp_path: Path) -> None:
    """An odd number of images, of which one device gets more than the other."""
    model = ["--model", "anomalib_dhkd.Dhkd", *(f"--model.{key}={value}" for key, value in SMALL.items())]
    data = ["--data", "Quickstart", "--data.root", str(quickstart_root), "--data.num_train=7", "--data.num_test=2"]
    batches = ["--data.train_batch_size=2", "--data.num_workers=0", "--model.train_steps=8"]
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"]
    checkpoints = []
    for name, more in (("one", []), ("kept", devices), ("extracted", [*devices, "--model.cache_limit=null"])):
        (tmp_path / name).mkdir()
        output = anomalib(tmp_path / name, "train", *model, *data, *batches, *more)
        assert len(list((tmp_path / name).rglob("report.html"))) == 1
        assert "isn't written" not in output
        steps = "2 epochs" if name == "one" else "4 epochs"  # of 2 steps, half as many as with one device
        assert f"DHKD trains for 8 steps ({steps})" in output
        checkpoints.append(next((tmp_path / name).rglob("model.ckpt")))
    states = [torch.load(path, weights_only=True) for path in checkpoints]
    assert [state["global_step"] for state in states] == [8, 8, 8]
    one, kept, extracted = (state["state_dict"] for state in states)
    assert all(value.isfinite().all() for weights in (kept, extracted) for value in weights.values())
    # What is estimated from images is estimated from all of them: exactly, or but for half precision.
    for key, value in one.items():
        if "statistics" in key or ".mixtures." in key:
            torch.testing.assert_close(kept[key], value, rtol=0, atol=0, msg=key)
        if "statistics" in key:
            torch.testing.assert_close(extracted[key], value, rtol=1e-3, atol=1e-3, msg=key)
    # The thresholds come from the validation images of both.
    datamodule = Quickstart(root=quickstart_root, num_train=7, num_test=2, num_workers=0)
    trained = Dhkd.load_from_checkpoint(checkpoints[1])
    expected = trained.post_processor.image_threshold.clone()
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    engine.validate(model=trained, datamodule=datamodule)
    torch.testing.assert_close(trained.post_processor.image_threshold, expected)
    # Batches differ, and so do the networks; what is found doesn't.
    images = Quickstart(root=tmp_path / "images", num_train=7, num_test=12, num_workers=0)
    found = [engine.test(model=Dhkd.load_from_checkpoint(path), datamodule=images)[0] for path in checkpoints]
    for name in ("image_AUROC", "pixel_AUROC"):
        assert found[0][name] > 0.8, found
        assert [each[name] for each in found[1:]] == pytest.approx([found[0][name]] * 2, abs=0.02), found


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
    for words in ("--model.flow_steps", "Couplings of the normalising-flow teacher", "{mean,max,topk,contrast}"):
        assert words in help_text


def test_metrics_are_those_of_the_raw_scores(trained: Trained) -> None:
    engine, model, datamodule, _ = trained
    (logged,) = engine.test(model=model, datamodule=datamodule, verbose=False)
    batch = datamodule.test_data.collate_fn(list(datamodule.test_data))
    image, mask = model.pre_processor.transform(batch.image, batch.gt_mask)
    with torch.no_grad():
        raw = model.eval().model(image)
    labels, scores = batch.gt_label.numpy(), raw.pred_score.flatten().numpy()
    pixel_labels, pixel_scores = mask.flatten().numpy(), raw.anomaly_map.flatten().numpy()
    assert logged["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert logged["image_AUPR"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    f1_scores = [f1_score(labels, scores >= threshold) for threshold in scores]
    assert logged["image_F1Max"] == pytest.approx(max(f1_scores), abs=1e-6)
    assert logged["pixel_AUROC"] == pytest.approx(roc_auc_score(pixel_labels, pixel_scores), abs=1e-5)
    aupro = AUPRO(fields=["anomaly_map", "gt_mask"])
    aupro.update(ImageBatch(image=image, gt_mask=mask, anomaly_map=raw.anomaly_map))
    assert logged["pixel_AUPRO"] == pytest.approx(aupro.compute().item(), abs=1e-5)
    assert {"image_F1Score", "pixel_F1Score"} < logged.keys()
    # The paper's objective: on anomalies the teacher moves.
    assert logged["teacher_shift"] > 1
    assert logged["student_shift"] > 0
