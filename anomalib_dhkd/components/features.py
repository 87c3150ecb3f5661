# SPDX-License-Identifier: Apache-2.0

"""Frozen feature pyramids, standardised per channel."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_name
from torch import nn
from torch.nn import functional as F  # noqa: N812

from . import backbones  # noqa: F401  # registers the bundled backbones with timm
from .moments import mean_and_variance, moments

NEIGHBOURHOOD = 3
"""Rows and columns of a neighbourhood, over which features are averaged."""
PORTION = 2
"""Images that a CPU extracts at a time; what a layer makes of more doesn't fit its caches and takes twice as long."""


class FeaturePyramid(nn.Module):
    """Feature maps of a frozen backbone, each channel with mean 0 and variance 1 over the training images.

    CNNs give one map a layer at the layer's own resolution, vision transformers one map a block, all of the same
    size. Images enter with values in ``[0, 1]``: the mean and standard deviation that the backbone was trained with
    are applied here, so that no backbone can be fed wrongly.

    Args:
        backbone (str): Name of a timm model; ``efficientnet_lite0_bundled`` needs no download.
        layers (Sequence[str]): Layers to extract, by their names in timm's ``feature_info`` (``blocks.<index>`` in a
            vision transformer), finest first.
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
        if weights is not None and not pre_trained:
            msg = f"weights is {weights}, but pre_trained is False: set pre_trained to True, or weights to null."
            raise ValueError(msg)
        indices = _layer_indices(backbone, layers)
        network = _create_backbone(backbone, pre_trained, weights)
        self.channels: list[int] = [network.feature_info[index]["num_chs"] for index in indices]
        source = timm.data.resolve_model_data_config(network)
        self.indices = network.prune_intermediate_layers(indices, prune_norm=True)  # what follows the last is dropped
        self.backbone: Any = network.requires_grad_(requires_grad=False)
        self.register_buffer("image_mean", torch.tensor(source["mean"]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(source["std"]).view(1, -1, 1, 1), persistent=False)
        self.image_mean: torch.Tensor
        self.image_std: torch.Tensor
        self.statistics: Any = nn.ModuleList(nn.BatchNorm2d(channels, affine=False) for channels in self.channels)
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
        whole = torch.compiler.is_exporting() or images.device.type != "cpu"
        maps = [
            self.backbone.forward_intermediates(portion, indices=self.indices, intermediates_only=True)
            for portion in ([images] if whole else images.split(PORTION))
        ]
        return maps[0] if len(maps) == 1 else [torch.cat(scale) for scale in zip(*maps, strict=True)]

    @contextmanager
    def fixed_size(self, height: int, width: int) -> Iterator[None]:
        """Have a vision transformer hold its encoding of positions for one size of images, as an export needs it.

        Otherwise it interpolates the encoding with antialiasing, which OpenVINO does without.

        Args:
            height (int): Height of the images.
            width (int): Width of the images.
        """
        flexible = self.backbone
        if hasattr(flexible, "set_input_size"):
            self.backbone = deepcopy(flexible)
            patch = flexible.patch_embed.patch_size
            sides = zip((height, width), patch, strict=True)
            self.backbone.set_input_size(tuple(math.ceil(side / length) * length for side, length in sides))
        try:
            yield
        finally:
            self.backbone = flexible

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
        sums: list[Any] = [0.0 for _ in self.statistics]
        for features in batches:
            for index, feature in enumerate(features):
                sums[index] += moments(feature.cpu().double().movedim(1, -1).flatten(0, -2))
        for statistics, total in zip(self.statistics, sums, strict=True):
            mean, variance = mean_and_variance(total)
            statistics.running_mean.copy_(mean)
            statistics.running_var.copy_(variance)


class FeaturePyramids(FeaturePyramid):
    """Feature pyramids of one or more backbones, their maps one after the other.

    Args:
        backbone (Sequence[str] | str): Name of a timm model, or names. See :class:`FeaturePyramid`.
        layers (Sequence[Sequence[str]] | Sequence[str]): Layers to extract, of several backbones a sequence for each.
        pre_trained (bool): Load ImageNet weights. Defaults to ``True``.
        weights (Sequence[str | Path | None] | str | Path | None): File with a state dict, of several backbones one or
            ``None`` for each. Defaults to ``None``.

    Attributes:
        layers (list[str]): Layers of the first backbone.
        channels (list[int]): Channels of the first backbone's maps.
        further_channels (list[int]): Channels of the other backbones' maps.

    Raises:
        ValueError: If there aren't as many sequences of layers or files as backbones, or as of a single pyramid.
    """

    def __init__(
        self,
        backbone: Sequence[str] | str,
        layers: Sequence[Sequence[str]] | Sequence[str],
        pre_trained: bool = True,
        weights: Sequence[str | Path | None] | str | Path | None = None,
    ) -> None:
        several = not isinstance(backbone, str)
        names = list(backbone) if several else [str(backbone)]
        chosen: list[Any] = list(layers) if several else [layers]
        files: Any = [weights] if not several else weights or [None] * len(names)
        if len(chosen) != len(names) or any(isinstance(item, str) for item in chosen):
            msg = f"layers must be a list for each of the backbones {names}, got {layers}."
            raise ValueError(msg)
        paths: list[Any] = [] if isinstance(files, str | Path) else list(files)
        if len(paths) != len(names) or not all(isinstance(path, str | Path | None) for path in paths):
            msg = f"weights must be a file or null for each of the backbones {names}, got {weights}."
            raise ValueError(msg)
        super().__init__(names[0], chosen[0], pre_trained, paths[0])
        self.layers: list[str] = list(chosen[0])
        further = [
            FeaturePyramid(name, own, pre_trained, file)
            for name, own, file in zip(names[1:], chosen[1:], paths[1:], strict=True)
        ]
        self.further: Any = nn.ModuleList(further)
        self.further_channels = [channels for pyramid in further for channels in pyramid.channels]
        for pyramid in further:
            self.statistics.extend(pyramid.statistics)
            pyramid.statistics = nn.ModuleList()

    def extract(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Run the frozen backbones; see :meth:`FeaturePyramid.extract`."""
        return [*super().extract(images), *(feature for pyramid in self.further for feature in pyramid.extract(images))]

    @contextmanager
    def fixed_size(self, height: int, width: int) -> Iterator[None]:
        """Have all vision transformers hold their encoding; see :meth:`FeaturePyramid.fixed_size`."""
        with ExitStack() as stack:
            stack.enter_context(super().fixed_size(height, width))
            for pyramid in self.further:
                stack.enter_context(pyramid.fixed_size(height, width))
            yield


def average(features: list[torch.Tensor]) -> list[torch.Tensor]:
    """Average features over neighbourhoods, as PatchCore does (CVPR 2022); at the edge over what there is of them.

    Args:
        features (list[torch.Tensor]): A map of shape ``(B, C, h, w)`` a layer.

    Returns:
        list[torch.Tensor]: Maps of the same shapes.
    """
    padding = NEIGHBOURHOOD // 2
    return [F.avg_pool2d(feature, NEIGHBOURHOOD, 1, padding, count_include_pad=False) for feature in features]


def _layer_indices(backbone: str, layers: Sequence[str]) -> list[int]:
    """Return where timm lists the layers; raise ``ValueError`` unless the backbone and every layer exist."""
    if not timm.is_model(get_arch_name(backbone)):
        close = timm.list_models(f"*{backbone[:6]}*")[:5]
        msg = f"backbone must be the name of a timm model (see timm.list_models()), got '{backbone}'; similar: {close}."
        raise ValueError(msg)
    model: Any = timm.create_model(get_arch_name(backbone))
    available = [info["module"] for info in model.feature_info]
    indices = [index for index, layer in enumerate(available) if layer in layers]
    if not layers or list(layers) != [available[index] for index in indices]:
        msg = f"layers must be some of {available}, in this order, for backbone '{backbone}'; got {list(layers)}."
        raise ValueError(msg)
    return indices


def _create_backbone(backbone: str, pre_trained: bool, weights: str | Path | None) -> Any:
    options: dict[str, Any] = {"exportable": True, "pretrained": pre_trained}
    if "vit" in backbone:
        options |= {"dynamic_img_size": True, "dynamic_img_pad": True}  # sides needn't be multiples of a patch
    if weights is None:
        try:
            return timm.create_model(backbone, **options)
        except Exception as error:
            if not pre_trained:
                raise
            msg = (
                f"No weights for backbone '{backbone}'. Tried timm's source for it, through the local cache and the "
                f"download, which gave: {type(error).__name__}: {error}\nWays out:\n"
                "  1. backbone: efficientnet_lite0_bundled, whose weights are installed already;\n"
                "  2. weights: the path of a file with the backbone's state dict, fetched elsewhere;\n"
                "  3. run once where the hub can be reached and copy its cache folder (HF_HOME) to this machine."
            )
            raise RuntimeError(msg) from error
    if not Path(weights).is_file():
        msg = f"weights must be a file with a state dict of '{backbone}', got '{weights}', which is no file."
        raise FileNotFoundError(msg)
    try:
        source = {"file": str(weights), "custom_load": False}  # a state dict, whatever form timm's own source has
        return timm.create_model(backbone, **options, pretrained_cfg_overlay=source)
    except Exception as error:
        msg = f"weights must hold a state dict of timm's '{backbone}', which '{weights}' doesn't: {error}"
        raise ValueError(msg) from error
