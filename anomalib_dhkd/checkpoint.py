# SPDX-License-Identifier: Apache-2.0

"""A checkpoint that knows itself: what loads it needs neither the arguments nor the weights of its training."""

import copy
import inspect
import logging
from abc import abstractmethod
from typing import Any

import torch
from anomalib.models.components import AnomalibModule
from anomalib.utils.path import paths_to_strings
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchvision import tv_tensors

from .components.features import FeaturePyramids

logger = logging.getLogger(__name__)

KEY = "dhkd_arguments"
"""Where in a checkpoint the model's arguments are, and the class of its pre-processor."""
FREE = {"train_steps", "cache_limit", "seed"}
"""Arguments that may differ from the checkpoint's, of which a model that is trained needs none."""
SETTINGS: dict[str, Any] = {
    "enable_normalization": True,
    "enable_thresholding": True,
    "enable_threshold_matching": True,
    "image_sensitivity": 0.5,
    "pixel_sensitivity": 0.5,
    "false_alarm_rate": None,
}
"""Settings of a post-processor that can be changed on a trained model, and their defaults."""
PROBE = (480, 640)
"""Height and width of the image that is sent through a transform to see where its positions go."""


class CheckpointMixin(AnomalibModule):
    """Takes arguments, weights and pre-processor from the checkpoint, and names what contradicts it.

    A model that validates, tests or predicts with a checkpoint becomes the checkpoint's. Whether an argument was given
    can't be told from its default, so a default gives way to the checkpoint's argument; any other value that differs is
    an error. A resumed training must have all its arguments again, and ``load_from_checkpoint`` can't replace them:
    there each difference is an error. Those in :data:`FREE` are free, but a resumed training keeps its seed. The
    post-processor's settings in :data:`SETTINGS` that were given, or changed on the model, win over the checkpoint's.

    ``Engine.export`` with a checkpoint makes a model from it alone and drops the one that it is given. To export with
    other settings, load the model with them first.

    Attributes:
        has_weights (bool): Whether the backbone has its weights, by a training or a checkpoint.
    """

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self.has_weights = False
        # What differs from these was given, and not loaded from a checkpoint.
        self.ungiven_settings = SETTINGS
        self.ungiven_transforms = {"None", transform_of(self.configure_pre_processor())}

    @abstractmethod
    def build(self) -> None:
        """Make the parts that follow from the arguments in ``hparams``."""

    def setup(self, stage: str) -> None:
        """Refuse a pre-processor before training that can't be restored afterwards, or displaces the heat maps.

        Raises:
            ValueError: If the pre-processor is such.
        """
        super().setup(stage)
        if stage == "fit":
            check_restorable(self.pre_processor)
            check_placement(self.pre_processor)

    def on_fit_start(self) -> None:
        """Read the backbone's weights, which nothing needs but a training that begins.

        Raises:
            ValueError: If the file in ``weights`` doesn't fit.
            FileNotFoundError: If ``weights`` is no file.
            RuntimeError: If weights can be had from nowhere.
        """
        super().on_fit_start()
        if not self.has_weights:
            source = self.hparams["backbone"], self.hparams["layers"], True, self.hparams["weights"]
            features: Any = self.model.features
            with torch.random.fork_rng(devices=[]):  # a training's random numbers follow from its seed alone
                features.load_state_dict(FeaturePyramids(*source).state_dict())
            self.has_weights = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the arguments where keyword arguments of ``load_from_checkpoint`` don't replace them."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KEY] = _plain(self.hparams) | {"pre_processor": _class_of(self.pre_processor)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the model of the checkpoint.

        Raises:
            ValueError: If an argument contradicts the checkpoint's, or the pre-processor can't be restored.
        """
        saved = checkpoint.get(KEY) or _plain(checkpoint["hyper_parameters"])
        stage = stage_of(self)
        conflicts = [*self._conflicts(saved, stage), *self._conflicts_of_pre_processor(checkpoint, stage)]
        has_one = checkpoint.get("anomalib_components_enabled", {}).get("post_processor", True)
        if stage and (self.post_processor is not None) != has_one:
            # The trainer has the model's among its callbacks already; without thresholds it would label every image.
            conflicts.append(f"post_processor must be {has_one}, as in the checkpoint, got {not has_one}")
        if conflicts:
            rest = "." if stage in {None, TrainerFn.FITTING} else "; what isn't given is taken from the checkpoint."
            raise ValueError("; ".join(conflicts) + rest)
        arguments = {name: saved[name] for name in self.hparams if name in saved}
        if stage not in {None, TrainerFn.FITTING} and arguments != _plain(self.hparams):
            self.hparams.update(arguments)
            self.build()
        given = {
            name: getattr(self.post_processor, name)
            for name, value in self.ungiven_settings.items()
            if getattr(self.post_processor, name, value) != value
        }
        super().on_load_checkpoint(checkpoint)
        # Metrics of a test that is over are worth nothing, and a model may have others.
        state = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("evaluator.")}
        own = self.state_dict()
        checkpoint["state_dict"] = state | {name: own[name] for name in own if name.startswith("evaluator.")}
        self.has_weights = True
        self.ungiven_transforms = self.ungiven_transforms | {transform_of(self.pre_processor)}
        self.ungiven_settings = {name: getattr(self.post_processor, name, SETTINGS[name]) for name in SETTINGS}
        for name, value in given.items():
            setattr(self.post_processor, name, value)

    def _conflicts(self, saved: dict[str, Any], stage: TrainerFn | None) -> list[str]:
        """Return what contradicts the checkpoint's arguments."""
        inferring = stage not in {None, TrainerFn.FITTING}
        own = _plain(self.hparams_initial if inferring else self.hparams)
        defaults = _plain({name: value.default for name, value in inspect.signature(type(self)).parameters.items()})
        return [
            f"{name} must be {saved[name]!r}, as in the checkpoint, got {value!r}"
            for name, value in own.items()
            if name in saved.keys() - FREE
            and value != saved[name]
            and not ((inferring or name == "weights") and value == defaults.get(name))
        ]

    def _conflicts_of_pre_processor(self, checkpoint: dict[str, Any], stage: TrainerFn | None) -> list[str]:
        """Return what contradicts the checkpoint's pre-processor."""
        own = _class_of(self.pre_processor)
        wanted = checkpoint.get(KEY, {}).get("pre_processor", own)
        if wanted != own and not (stage is None and wanted is None):  # without a trainer, anomalib takes it away
            return [f"pre_processor must be of the checkpoint's class {wanted}, which isn't restored, got {own}"]
        config = checkpoint.get("anomalib_pre_processor_config")
        if config is None or not hasattr(self.pre_processor, "load_checkpoint_config"):
            return []
        own, wanted = transform_of(self.pre_processor), transform_of(self.pre_processor, config)
        replaceable = set() if stage == TrainerFn.FITTING else self.ungiven_transforms
        if own in replaceable | {wanted}:
            return []
        return [f"the transform of pre_processor must be {wanted}, as in the checkpoint, got {own}"]


def stage_of(model: LightningModule) -> TrainerFn | None:
    """Return what the trainer does with a model; ``None`` without a trainer."""
    try:
        return model.trainer.state.fn
    except RuntimeError:
        return None


def transform_of(pre_processor: nn.Module | None, config: dict[str, Any] | None = None) -> str:
    """Describe a transform in a line, in the words that it has after a checkpoint.

    Args:
        pre_processor (nn.Module | None): Pre-processor.
        config (dict[str, Any] | None): What a checkpoint has of it. Defaults to its own configuration, if a checkpoint
            can hold that.

    Returns:
        str: Description.
    """
    transform = getattr(pre_processor, "transform", None)
    restored: Any = copy.deepcopy(pre_processor)
    if hasattr(restored, "load_checkpoint_config"):
        restored.load_checkpoint_config(config or restored.checkpoint_config())
        restored = restored.transform
        transform = restored if config or restored is not None else transform
    return " ".join(repr(transform).split())


def check_restorable(pre_processor: nn.Module | None) -> None:
    """Check that a checkpoint can hold what a pre-processor does.

    Args:
        pre_processor (nn.Module | None): Pre-processor.

    Raises:
        ValueError: If its transform would be lost.
    """
    restored: Any = copy.deepcopy(pre_processor)
    if getattr(restored, "transform", None) is None or not hasattr(restored, "load_checkpoint_config"):
        return
    restored.load_checkpoint_config(restored.checkpoint_config())
    if restored.transform is None:
        msg = (
            "The transform of pre_processor must be one that a checkpoint can hold, of torchvision's Resize, "
            f"Normalize, Grayscale and Compose, got {transform_of(pre_processor)}. What changes images in training "
            "belongs into the data module's train_augmentations."
        )
        raise ValueError(msg)


def check_placement(pre_processor: nn.Module | None) -> None:
    """Check that a transform leaves each position where it is, because heat maps are laid over the whole image.

    Args:
        pre_processor (nn.Module | None): Pre-processor.

    Raises:
        ValueError: If its transform crops, pads or turns images.
    """
    transform = getattr(pre_processor, "transform", None)
    if transform is None:
        return
    # Transforms of the light leave masks alone.
    rows, columns = (torch.linspace(0, 1, size) for size in PROBE)
    positions = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    _, moved = transform(tv_tensors.Image(torch.zeros(3, *PROBE)), tv_tensors.Mask(positions))
    size = moved.shape[-2:]
    expected = F.interpolate(positions[None], size, mode="nearest")[0]
    if (moved - expected).abs().max() > 2 / min(size):
        msg = (
            "The transform of pre_processor must not crop, pad or turn images, because heat maps are laid over the "
            f"whole image, got {transform_of(pre_processor)}. Crop the images themselves."
        )
        raise ValueError(msg)


def _plain(arguments: Any) -> dict[str, Any]:
    """Return arguments as a checkpoint and a command line have them."""
    arguments = paths_to_strings(dict(arguments))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}


def _class_of(component: nn.Module | None) -> str | None:
    return None if component is None else f"{type(component).__module__}.{type(component).__qualname__}"
