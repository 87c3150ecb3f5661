# SPDX-License-Identifier: Apache-2.0

"""Exported files against Engine's predictions on the files of images."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import openvino as ov
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from packaging.version import Version
from PIL import Image

from anomalib_dhkd import Dhkd
from anomalib_dhkd.images import as_input
from tests.helpers import SMALL, Trained

# Tracing the exporters would more than double their time.
pytestmark = pytest.mark.no_cover

F32 = {"INFERENCE_PRECISION_HINT": "f32"}
Predict = Callable[[Path], dict[str, np.ndarray]]


class Textures(NamedTuple):
    """A model trained on textures with fine noise, and where these and its exported files are."""

    datamodule: Folder
    model: Dhkd
    files: dict[str, Path]
    predictions: dict[Path, dict[str, np.ndarray]]


def _texture(seed: int, defect: bool) -> Image.Image:
    """Return a weave with noise of one pixel, of which plain bilinear resizing keeps everything."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:420, :500]
    image = 0.5 + 0.2 * np.sin(columns / 2)[..., None] * np.sin(rows / 3)[..., None] + rng.normal(0, 0.2, (420, 500, 3))
    if defect:
        top, left = rng.integers(100, 300, 2)
        image[top : top + 40, left : left + 60] *= 0.6
    return Image.fromarray((255 * image.clip(0, 1)).astype(np.uint8))


def outputs_of(batch: Any) -> dict[str, np.ndarray]:
    """Return score, label and map of one image."""
    return {name: np.asarray(getattr(batch, name)).squeeze() for name in ("pred_score", "pred_label", "anomaly_map")}


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Textures:
    """Train for a moment, predict with Engine, export."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("textures")
    for name, count in (("good", 8), ("good_test", 3), ("bad", 3)):
        (root / name).mkdir()
        for index in range(count):
            _texture(len(name) * 100 + index, name == "bad").save(root / name / f"{index}.png")
    datamodule = Folder(
        name="weave", root=root, normal_dir="good", normal_test_dir="good_test", abnormal_dir="bad",
        train_batch_size=4, eval_batch_size=1, num_workers=0,
    )  # fmt: skip
    model = Dhkd(**SMALL, train_steps=10, pre_processor=Dhkd.configure_pre_processor((96, 128)))
    engine = Engine(default_root_dir=root / "results", enable_progress_bar=False)
    engine.fit(model=model, datamodule=datamodule)
    predictions: dict[Path, dict[str, np.ndarray]] = {}
    for folder in ("good_test", "bad"):
        for batch in engine.predict(model=model, data_path=root / folder) or []:
            predictions[Path(batch.image_path[0])] = outputs_of(batch)
    model.eval()
    files = {
        "onnx": engine.export(model, ExportType.ONNX, root),
        "openvino": engine.export(model, ExportType.OPENVINO, root),
        "torch": engine.export(model, ExportType.TORCH, root),
        "checkpoint": Path(engine.best_model_path),
    }
    return Textures(datamodule, model, files, predictions)


def in_torch(textures: Textures) -> Predict:
    def predict(path: Path) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return outputs_of(textures.model(read_image(path, as_tensor=True)[None]))

    return predict


def in_the_torch_inferencer(textures: Textures) -> Predict:
    inferencer = TorchInferencer(textures.files["torch"], device="cpu")

    def predict(path: Path) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return outputs_of(inferencer.predict(path))

    return predict


def in_onnx_runtime(textures: Textures) -> Predict:
    session = onnxruntime.InferenceSession(textures.files["onnx"], providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def predict(path: Path) -> dict[str, np.ndarray]:
        values = session.run(names, {"input": read_image(path, as_tensor=True)[None].numpy()})
        return {name: value.squeeze() for name, value in zip(names, values, strict=True)}

    return predict


def in_openvino(textures: Textures) -> Predict:
    compiled = ov.Core().compile_model(textures.files["openvino"], "CPU", F32)

    def predict(path: Path) -> dict[str, np.ndarray]:
        outputs = compiled(read_image(path, as_tensor=True)[None].numpy())
        return {port.any_name: value.squeeze() for port, value in outputs.items()}

    return predict


def in_the_openvino_inferencer(textures: Textures) -> Predict:
    inferencer = OpenVINOInferencer(textures.files["openvino"], config=F32)
    return lambda path: outputs_of(inferencer.predict(path))


@pytest.mark.parametrize(
    "runs", [in_torch, in_the_torch_inferencer, in_onnx_runtime, in_openvino, in_the_openvino_inferencer]
)
def test_raw_files_get_the_scores_of_engine(
    runs: Callable[[Textures], Predict], textures: Textures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # OpenVINO's inferencer leaves a cache in the working directory
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")  # the torch file is a pickle
    predict = runs(textures)
    scores = np.array([expected["pred_score"] for expected in textures.predictions.values()])
    assert len(scores) == 6
    assert (np.abs(scores - 0.5) > 1e-3).all()  # halfway between two images' scores
    for path, expected in textures.predictions.items():
        outputs = predict(path)
        assert abs(outputs["pred_score"] - expected["pred_score"]) <= 1e-3
        assert np.quantile(np.abs(outputs["anomaly_map"] - expected["anomaly_map"]), 0.999) <= 5e-3
        assert outputs["pred_label"] == expected["pred_label"]


@pytest.mark.parametrize(
    ("frame", "order"),
    [
        (lambda rgb: rgb[..., ::-1], "BGR"),
        (lambda rgb: np.dstack([rgb, rgb[..., 0]]), "RGB"),
        (lambda rgb: rgb.astype(np.uint16) * 257, "RGB"),
        (lambda rgb: rgb[..., 0], "RGB"),
    ],
    ids=["BGR", "RGBA", "16 bits", "grey"],
)
def test_frames_of_a_camera_get_the_scores_of_their_files(
    frame: Callable[[np.ndarray], np.ndarray],
    order: Any,
    textures: Textures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    rgb = np.asarray(_texture(0, defect=True))
    seen = frame(rgb)
    Image.fromarray(seen if seen.ndim == 2 else rgb).save(tmp_path / "file.png")
    inferencer = OpenVINOInferencer(textures.files["openvino"], config=F32)
    expected = outputs_of(inferencer.predict(tmp_path / "file.png"))
    found = outputs_of(inferencer.predict(as_input(seen, order)[0]))
    assert 0 < expected["pred_score"] < 1
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_batches_of_a_fixed_size(textures: Textures) -> None:
    exported = ov.Core().read_model(textures.files["openvino"])
    exported.reshape([3, 3, 420, 500])
    compiled = ov.Core().compile_model(exported, "CPU", F32)
    paths = list(textures.predictions)[:3]
    outputs = compiled(np.stack([read_image(path, as_tensor=True).numpy() for path in paths]))
    scores = [float(textures.predictions[path]["pred_score"]) for path in paths]
    assert outputs["pred_score"].ravel().tolist() == pytest.approx(scores, abs=1e-3)


def test_files_describe_themselves(textures: Textures) -> None:
    restored = Dhkd.load_from_checkpoint(textures.files["checkpoint"])
    expected = {name: value for name, value in restored.description().items() if name != "date"}
    post_processor: Any = textures.model.post_processor
    assert expected["training_data"] == "weave"
    assert expected["image_size"] == "96x128"
    assert float(expected["image_threshold"]) == pytest.approx(float(post_processor.image_threshold))
    assert float(expected["normalized_pixel_threshold"]) == 0.5

    described = ov.Core().read_model(textures.files["openvino"]).get_rt_info("anomalib_dhkd").astype(dict)
    of_openvino = {name: value.astype(str) for name, value in described.items()}
    of_onnx = {
        prop.key.removeprefix("anomalib_dhkd."): prop.value
        for prop in onnx.load(textures.files["onnx"]).metadata_props
        if prop.key.startswith("anomalib_dhkd.")
    }
    for found in (of_openvino, of_onnx):
        assert found.pop("date").startswith("20")
        assert found == expected


@pytest.mark.parametrize(
    ("compression_type", "stored", "size", "fixed_batch", "largest"),
    [
        (None, ov.Type.f32, (256, 256), True, 1e-3),
        (CompressionType.FP16, ov.Type.f16, (320, 192), False, 1e-2),
        (CompressionType.INT8, ov.Type.u8, (384, 384), True, 0.1),
    ],
)
def test_every_compression_size_and_batch(
    compression_type: CompressionType | None,
    stored: ov.Type,
    size: tuple[int, int],
    fixed_batch: bool,
    largest: float,
    trained: Trained,
    tmp_path: Path,
) -> None:
    engine, model, datamodule, _ = trained
    path = engine.export(
        model, ExportType.OPENVINO, tmp_path, input_size=size, compression_type=compression_type,
        datamodule=datamodule, onnx_kwargs={"dynamic_shapes": None} if fixed_batch else None,
    )  # fmt: skip
    exported = ov.Core().read_model(path)
    assert exported.input(0).partial_shape == ov.PartialShape([1 if fixed_batch else -1, 3, *size])
    constants = [operation for operation in exported.get_ops() if operation.get_type_name() == "Constant"]
    assert any(constant.get_element_type() == stored and len(constant.shape) == 4 for constant in constants)
    compiled = ov.Core().compile_model(exported, "CPU", F32)
    for item in datamodule.test_data:
        image = torch.nn.functional.interpolate(item.image[None], size, mode="bilinear", antialias=True)
        with torch.no_grad():
            expected = model(image)
        outputs = compiled(image.numpy())
        assert abs(outputs["pred_score"] - expected.pred_score.numpy()).max() <= largest


def _convolutions(compiled: ov.CompiledModel, precision: str) -> int:
    """Count the convolutions that are computed in a precision."""
    operations = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
    found = [
        info["runtimePrecision"].astype(str) for info in operations if info["layerType"].astype(str) == "Convolution"
    ]
    return found.count(precision)


@pytest.fixture(scope="module")
def half(textures: Textures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's file that may compute in half precision."""
    folder = tmp_path_factory.mktemp("half")
    engine = Engine(default_root_dir=folder)
    return engine.export(textures.model, ExportType.OPENVINO, folder, compression_type=CompressionType.FP16)


@pytest.mark.skipif(Version(version("openvino")) < Version("2026"), reason="OpenVINO reads precisions from 2026 on")
@pytest.mark.parametrize("hint", ["bf16", "f16"])
def test_files_keep_their_precision_on_every_processor(hint: str, textures: Textures, half: Path) -> None:
    """Plain bright images: weights of the resize that are rounded draw stripes on them."""
    plain = (0.9 + np.random.default_rng(0).normal(0, 0.01, (4, 3, 250, 270))).clip(0, 1).astype(np.float32)
    found = []
    for path, tolerance in ((textures.files["openvino"], 5e-3), (half, 4e-2)):
        single, other = (
            ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": precision}) for precision in ("f32", hint)
        )
        for image in plain:
            expected, outputs = single(image[None]), other(image[None])
            assert 0 < expected["pred_score"] < 1
            assert abs(outputs["pred_score"] - expected["pred_score"]) <= tolerance
            assert np.quantile(np.abs(outputs["anomaly_map"] - expected["anomaly_map"]), 0.99) <= tolerance
        found.append(_convolutions(other, hint))
    if other.get_property("INFERENCE_PRECISION_HINT").get_type_name() == hint:  # else the processor doesn't have it
        assert found[0] < found[1] / 10


def test_a_vision_transformer_sees_positions_in_the_file_as_in_training(tmp_path: Path) -> None:
    size = Dhkd.configure_pre_processor((100, 70))  # no multiples of the patch
    model = Dhkd("vit_tiny_patch16_224", ["blocks.1"], width=8, num_gaussians=0, image_score="mean", pre_processor=size)
    torch.nn.init.normal_(model.model.features.backbone.pos_embed)  # untrained, they are hardly there
    images = torch.rand(2, 3, 200, 130)
    file = model.to_openvino(tmp_path)
    with torch.no_grad():
        expected = model.eval().model(model.pre_processor(images))
    compiled = ov.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = {output.get_any_name(): value for output, value in compiled(images.numpy()).items()}
    np.testing.assert_allclose(outputs["anomaly_map"], expected.anomaly_map, rtol=0, atol=1e-3)


def test_int8_acq_needs_data(trained: Trained, tmp_path: Path) -> None:
    engine, model, *_ = trained
    with pytest.raises(ValueError, match="datamodule must be given for compression_type INT8_ACQ, got None"):
        engine.export(model, ExportType.OPENVINO, tmp_path, compression_type=CompressionType.INT8_ACQ)
    assert not list(tmp_path.rglob("*.xml"))
