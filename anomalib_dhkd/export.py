# SPDX-License-Identifier: Apache-2.0

"""Export that keeps the scores, and says in the file where it comes from."""

from collections.abc import Iterable
from contextlib import nullcontext
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import F1Score
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torch.utils.data import Subset
from torchvision.transforms.v2 import Resize

from .pre_processor import AntialiasingPreProcessor

EXAMPLES = 300
"""Training images at most that ranges and biases are taken from."""
CONVOLUTIONS = {"Convolution", "GroupConvolution"}
"""OpenVINO's operations that half precision harms little: all of the backbone's, and the networks'."""
SECTION = "anomalib_dhkd"
"""Where the description stands in a file: section of ``rt_info``, first part of the keys of ``metadata_props``."""
PRECISE = "dynamic:bf16,f16"
"""Mark of an operation that no device turns into half precision, as ``ov::disable_conversion`` sets it in C++."""


class FaithfulExportMixin(AnomalibModule):
    """anomalib's export, but the files compute what the model does, and describe it.

    - Images of any size are resized with antialiasing, as in training, also by a plain
      :class:`~anomalib.pre_processing.PreProcessor` that the model was given.
    - ``INT8_PTQ`` and ``INT8_ACQ`` quantise dense convolutions alone, and not the backbone's first, finest ones.
      anomalib quantises every operation. Scoring takes differences of nearly equal numbers, squares and logarithms, of
      which eight bits leave nothing, and depthwise convolutions lose more than they gain.
    - Files carry :meth:`description`: OpenVINO's in ``rt_info`` under ``["anomalib_dhkd", key]``, ONNX's in
      ``metadata_props`` under ``anomalib_dhkd.key``.
    - OpenVINO's files compute in single precision on every device. OpenVINO takes bfloat16 on processors that can,
      those with AMX or AVX-512 BF16, and float16 on GPUs, unless what loads a file asks for another precision. In half
      precision scores move, and labels can change. Therefore each operation is marked to keep its precision (OpenVINO
      2026 and later read that). With the compression ``FP16``, convolutions aren't, and follow
      ``INFERENCE_PRECISION_HINT``.

    Attributes:
        training_data (str): Data module and category that the model was trained on; empty where unknown.
    """

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self.training_data = ""
        if type(self.pre_processor) is PreProcessor:
            self.pre_processor = AntialiasingPreProcessor(self.pre_processor.transform)

    def on_fit_start(self) -> None:
        """Note what the model is trained on."""
        super().on_fit_start()
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        names = (getattr(datamodule, name, None) for name in ("name", "category"))
        self.training_data = "/".join(name for name in names if name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the model was trained on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[SECTION] = {"training_data": self.training_data}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over what the model was trained on."""
        super().on_load_checkpoint(checkpoint)
        self.training_data = checkpoint.get(SECTION, {}).get("training_data", "")

    def description(self, precision: str = "f32") -> dict[str, str]:
        """Describe the model for who finds the file.

        Args:
            precision (str): Lowest precision that the file may compute in. Defaults to ``"f32"``.

        Returns:
            dict[str, str]: Version of this package, data module and category of the training, height and width that
                images are resized to, the precision, date of the export, and of anomalib's post-processor the
                thresholds of raw and of normalised scores.
        """
        size = self.input_size
        values: dict[str, Any] = {
            "version": version("anomalib-dhkd"),
            "training_data": self.training_data or "unknown",
            "image_size": "any" if size is None else f"{size[0]}x{size[1]}",
            "precision": precision,
            "date": datetime.now(tz=timezone.utc).isoformat(timespec="seconds"),
        }
        if isinstance(self.post_processor, PostProcessor):
            for name in (
                "image_threshold",
                "pixel_threshold",
                "normalized_image_threshold",
                "normalized_pixel_threshold",
            ):
                values[name] = float(getattr(self.post_processor, name))
        return {name: str(value) for name, value in values.items()}

    def to_onnx(  # type: ignore[override]  # Lightning's is another
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX.

        Args:
            export_root (Path | str): Folder for ``weights/onnx``.
            model_file_name (str): Name of the file. Defaults to ``"model"``.
            input_size (tuple[int, int] | None): Height and width of the images. Defaults to any.
            **kwargs (Any): Arguments of :func:`torch.onnx.export`; with ``dynamic_shapes=None`` images come one by one.

        Returns:
            Path: File of the model (.onnx).
        """
        import onnx  # noqa: PLC0415  # takes a while

        size = self.input_size or input_size
        network: Any = self.model
        with network.features.fixed_size(*size) if size else nullcontext():
            # The exporter's own version: converting to the older one that anomalib asks for fails, with a page of
            # warnings.
            path = super().to_onnx(export_root, model_file_name, input_size, **{"opset_version": 18, **kwargs})
        model = onnx.load(path, load_external_data=False)
        description = {f"{SECTION}.{name}": value for name, value in self.description().items()}
        onnx.helper.set_model_props(model, description)
        onnx.save(model, path)
        return path

    def to_openvino(  # type: ignore[override]  # what follows the data goes by keyword, as Engine does it
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Any = None,
        max_drop: float = 0.01,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO.

        Args:
            export_root (Path | str): Folder for ``weights/openvino``.
            model_file_name (str): Name of the files. Defaults to ``"model"``.
            input_size (tuple[int, int] | None): Height and width of the images. Defaults to any.
            compression_type (CompressionType | None): Compression. Defaults to none.
            datamodule (AnomalibDataModule | None): Data whose training images ``INT8_PTQ`` and ``INT8_ACQ`` take their
                ranges from.
            metric (AnomalibMetric | None): What ``INT8_ACQ`` keeps on the validation images, higher for better.
                Defaults to the F1 score of the labels.
            max_drop (float): By how much ``INT8_ACQ`` may lower it. Defaults to ``0.01``.
            **kwargs (Any): Further arguments of anomalib's method.

        Returns:
            Path: File of the model (.xml).

        Raises:
            ValueError: If ``INT8_PTQ`` or ``INT8_ACQ`` has no ``datamodule``.
            ModuleNotFoundError: If a compression to INT8 lacks NNCF.
        """
        import openvino as ov  # noqa: PLC0415  # takes seconds

        half = compression_type == CompressionType.FP16
        int8 = not half and compression_type is not None
        if int8:
            _check(CompressionType(compression_type), datamodule)
        with TemporaryDirectory() as folder:
            path = super().to_openvino(folder, model_file_name, input_size, **kwargs)
            _keep_precision(path, CONVOLUTIONS if half else set())
            model = ov.Core().read_model(path, config={"ENABLE_MMAP": False})  # the folder goes, the model stays
            path = Path(export_root) / path.relative_to(folder)
        if int8:
            model = self._quantise(model, compression_type, input_size, datamodule, metric, max_drop)
        for name, value in self.description("f16" if half else "f32").items():
            model.set_rt_info(value, [SECTION, name])
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(model, path, compress_to_fp16=half)
        return path

    def _quantise(
        self,
        model: Any,
        compression_type: CompressionType | None,
        input_size: tuple[int, int] | None,
        datamodule: Any,
        metric: Any,
        max_drop: float,
    ) -> Any:
        """Return an OpenVINO model in INT8."""
        import nncf  # noqa: PLC0415  # an optional extra

        # Constants are the convolutions' weights, too.
        others = sorted({operation.get_type_name() for operation in model.get_ops()} - {"Convolution", "Constant"})
        if compression_type == CompressionType.INT8:
            return nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(types=others))
        datamodule.setup("fit")
        images = datamodule.train_data
        chosen = np.unique(np.linspace(0, len(images) - 1, EXAMPLES).round().astype(int))
        transform = Resize(input_size, antialias=True) if input_size else getattr(self.pre_processor, "transform", None)
        examples = nncf.Dataset(
            Subset(images, chosen.tolist()),
            lambda item: (transform(item.image) if transform else item.image)[None].numpy(),
        )
        shape = next(iter(examples.get_inference_data())).shape
        arguments: dict[str, Any] = {
            "subset_size": len(chosen),
            "preset": nncf.QuantizationPreset.MIXED,
            "fast_bias_correction": False,  # an error that a layer makes on all images alike is a defect to the mixture
            "ignored_scope": nncf.IgnoredScope(types=others, names=_finest_convolutions(model, shape)),
        }
        if compression_type == CompressionType.INT8_PTQ:
            return nncf.quantize(model, examples, **arguments)
        metric = metric or F1Score(fields=["pred_label", "gt_label"])

        def quality(compiled: Any, batches: Iterable[Any]) -> float:
            metric.reset()
            for batch in batches:
                image, mask = transform(batch.image, batch.gt_mask) if transform else (batch.image, batch.gt_mask)
                outputs: Any = {port.any_name: torch.from_numpy(out) for port, out in compiled(image.numpy()).items()}
                metric.update(ImageBatch(image=image, gt_label=batch.gt_label, gt_mask=mask, **outputs))
            return float(metric.compute())

        return nncf.quantize_with_accuracy_control(
            model, examples, nncf.Dataset(datamodule.val_dataloader()), quality, max_drop=max_drop, **arguments
        )


def _finest_convolutions(model: Any, shape: tuple[int, ...]) -> list[str]:
    """Return the names of a model's first convolutions, whose maps have at least half the rows of the finest one.

    A plain surface leaves some of eight bits' steps in them, and rounded to those it is another surface.

    Args:
        model (Any): Model of OpenVINO.
        shape (tuple[int, ...]): Shape of a batch of images, because the model may take any.

    Returns:
        list[str]: Names as NNCF knows them.
    """
    fixed = model.clone()
    fixed.reshape(list(shape))
    rows = {
        operation.get_friendly_name(): operation.get_output_shape(0)[2]
        for operation in fixed.get_ops()
        if operation.get_type_name() == "Convolution"
    }
    finest = max(rows.values())
    return [name for name, count in rows.items() if 2 * count >= finest]


def _keep_precision(path: Path, but: set[str]) -> None:
    """Mark the operations of a file (.xml), except those of some types, to be computed in their own precision."""
    tree = ET.parse(path)  # noqa: S314  # our own file
    for layer in tree.iter("layer"):
        if layer.get("type") not in {"Parameter", "Const", "Result"} | but:
            info = layer.find("rt_info")
            info = ET.SubElement(layer, "rt_info") if info is None else info
            ET.SubElement(info, "attribute", {"name": "DisablePrecisionConversion", "version": "0", "value": PRECISE})
    tree.write(path)


def _check(compression_type: CompressionType, datamodule: AnomalibDataModule | None) -> None:
    """Refuse a compression to INT8 that can't be had, before anything is exported."""
    if compression_type != CompressionType.INT8 and datamodule is None:
        msg = f"datamodule must be given for compression_type {compression_type.name}, got None."
        raise ValueError(msg)
    try:
        import nncf  # noqa: F401, PLC0415  # an optional extra
    except ModuleNotFoundError as error:
        msg = f"compression_type {compression_type.name} needs NNCF: pip install 'anomalib-dhkd[int8]'."
        raise ModuleNotFoundError(msg) from error
