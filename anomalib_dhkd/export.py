# SPDX-License-Identifier: Apache-2.0

"""Export to OpenVINO in INT8 that keeps the scores."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin
from torch.utils.data import Subset
from torchvision.transforms.v2 import Resize

EXAMPLES = 300
"""Training images at most that ranges and biases are taken from."""


class DenseInt8ExportMixin(ExportMixin):
    """anomalib's export, but with ``INT8_PTQ`` dense convolutions alone are quantised.

    anomalib quantises every operation. Scoring takes differences of nearly equal numbers, squares and logarithms, of
    which eight bits leave nothing, and depthwise convolutions lose more than they gain.
    """

    def to_openvino(  # type: ignore[override]  # what follows the data goes by keyword, as Engine does it
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        **kwargs,
    ) -> Path:
        """Export to OpenVINO.

        Args:
            export_root (Path | str): Folder for ``weights/openvino``.
            model_file_name (str): Name of the files. Defaults to ``"model"``.
            input_size (tuple[int, int] | None): Height and width of the images. Defaults to any.
            compression_type (CompressionType | None): Compression. Defaults to none.
            datamodule (AnomalibDataModule | None): Data whose training images ``INT8_PTQ`` takes its ranges from.
            **kwargs: Further arguments of anomalib's method.

        Returns:
            Path: File of the model (.xml).

        Raises:
            ValueError: If ``INT8_PTQ`` has no ``datamodule``.
            ModuleNotFoundError: If ``INT8_PTQ`` lacks NNCF.
        """
        if compression_type != CompressionType.INT8_PTQ:
            return super().to_openvino(export_root, model_file_name, input_size, compression_type, datamodule, **kwargs)
        if datamodule is None:
            msg = "datamodule must be given for compression_type INT8_PTQ, got None."
            raise ValueError(msg)
        try:
            import nncf  # noqa: PLC0415  # an optional extra
        except ModuleNotFoundError as error:
            msg = "compression_type INT8_PTQ needs NNCF: pip install 'anomalib-dhkd[int8]'."
            raise ModuleNotFoundError(msg) from error
        import openvino as ov  # noqa: PLC0415  # takes seconds

        datamodule.setup("fit")
        images: Any = datamodule.train_data
        chosen = np.unique(np.linspace(0, len(images) - 1, EXAMPLES).round().astype(int))
        pre_processor: Any = getattr(self, "pre_processor", None)
        resize = Resize(input_size, antialias=True) if input_size else getattr(pre_processor, "transform", None)
        with TemporaryDirectory() as folder:
            path = super().to_openvino(folder, model_file_name, input_size, **kwargs)
            model = ov.Core().read_model(path, config={"ENABLE_MMAP": False})  # the folder goes, the model stays
            path = Path(export_root) / path.relative_to(folder)
        others = {operation.get_type_name() for operation in model.get_ops()} - {"Convolution"}
        quantised = nncf.quantize(
            model,
            nncf.Dataset(
                Subset(images, chosen.tolist()),
                lambda item: (resize(item.image) if resize else item.image)[None].numpy(),
            ),
            subset_size=len(chosen),
            preset=nncf.QuantizationPreset.MIXED,
            fast_bias_correction=False,  # an error that a layer makes on all images alike is a defect to the mixture
            ignored_scope=nncf.IgnoredScope(types=sorted(others)),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(quantised, path, compress_to_fp16=False)
        return path
