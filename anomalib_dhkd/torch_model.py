# SPDX-License-Identifier: Apache-2.0

"""DHKD as a plain PyTorch model.

Reimplemented from the published abstract of "Unsupervised Image Anomaly Detection with Denoised Heterogeneous Networks
via Knowledge Distillation". An invertible flow (the teacher) and a denoising feed-forward network (the student) look
at the same frozen features; where they disagree, the image is anomalous.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from timm.layers import build_sincos2d_pos_embed
from torch import nn

from .anomaly_map import AnomalyMapGenerator, resize
from .components.features import FeaturePyramids, average
from .components.mixture import FeatureMixture
from .components.noise import add_region_noise
from .components.student import DenoisingStudent
from .components.teacher import FlowTeacher

POSITIONAL_CHANNELS = 32
"""Channels of the sinusoidal encoding of the position, which conditions teacher and student as in AST (WACV 2023)."""
MIXTURES = {"mixture": 0.4, "averaged_mixture": 0.3, "further_mixture": 0.4}
"""One on the features as they are, which show what is fine; one on averaged ones, which suit parts that vary.

The third is on a second backbone's features, where there is one. Joined with the first one's in one mixture, they hide
what is fine. The numbers are the mixtures' weights in the map, beside those of teachers and students; all are scaled to
a sum of 1.
"""
FINER, COARSEST = 0.1, 0.2
"""Weights of teacher and student at all finer layers together, and at the coarsest one."""


class Responses(NamedTuple):
    """What the networks make of a batch of images.

    Attributes:
        features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a layer, of all backbones.
        teacher (list[torch.Tensor]): Latent variables of the flow, of the shapes of the first backbone's features;
            without a flow what would enter it.
        student (list[torch.Tensor]): Predictions of the teacher's; zeros without a student.
    """

    features: list[torch.Tensor]
    teacher: list[torch.Tensor]
    student: list[torch.Tensor]


class DhkdModel(nn.Module):
    """Frozen features, flow teacher, denoising student and the anomaly map of their differences.

    Args:
        backbone (Sequence[str] | str): Name of a timm model, or of two. Teacher and student look at the first alone.
        layers (Sequence[Sequence[str]] | Sequence[str]): Layers of the backbone, one scale each, finest first; of two
            backbones a list for each.
        weights (Sequence[str | Path | None] | str | Path | None): Local file with the backbone's weights, likewise.
        width (int): Channels inside teacher and student at the first layer; at the others in proportion to the layers'
            own channels.
        flow_steps (int): Couplings of the teacher; with 0 the standardised features take the teacher's place.
        student_blocks (int): Dual-domain blocks of the student; with 0 there is no student, and the teacher's
            likelihood takes the place of their difference.
        frequency_branch (bool): Whether the student's blocks have their frequency branch.
        noise_std (float): Standard deviation of the feature noise in training, 0 for none.
        num_gaussians (int): Local Gaussians of each mixture over the features of all layers of a backbone; 0 for no
            mixtures.
        image_score (str): See ``anomalib_dhkd.anomaly_map.AnomalyMapGenerator``.
        pre_trained (bool): Load the backbone's ImageNet weights. Defaults to ``True``.

    Raises:
        ValueError: If an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        backbone: Sequence[str] | str,
        layers: Sequence[Sequence[str]] | Sequence[str],
        weights: Sequence[str | Path | None] | str | Path | None,
        width: int,
        flow_steps: int,
        student_blocks: int,
        frequency_branch: bool,
        noise_std: float,
        num_gaussians: int,
        image_score: str,
        pre_trained: bool = True,
    ) -> None:
        scores = ("mean", "max", "topk", "contrast")
        names = [backbone] if isinstance(backbone, str) else list(backbone)
        for name, value, allowed, valid in (
            ("backbone", names, "one name or two", len(names) in {1, 2}),
            ("backbone", names, "one name when num_gaussians is 0", len(names) == 1 or num_gaussians > 0),
            ("width", width, "at least 1", width >= 1),
            ("flow_steps", flow_steps, "at least 0", flow_steps >= 0),
            ("student_blocks", student_blocks, "at least 0", student_blocks >= 0),
            ("student_blocks", student_blocks, "above 0 when flow_steps is 0", student_blocks > 0 or flow_steps > 0),
            ("noise_std", noise_std, "at least 0", noise_std >= 0),
            ("num_gaussians", num_gaussians, "0 or at least 2", num_gaussians == 0 or num_gaussians >= 2),
            ("image_score", image_score, f"one of {scores}", image_score in scores),
        ):
            if not valid:
                msg = f"{name} must be {allowed}, got {value!r}."
                raise ValueError(msg)
        super().__init__()
        self.features = FeaturePyramids(backbone, layers, pre_trained, weights)
        self.noise_std = noise_std
        own, further = sum(self.features.channels), sum(self.features.further_channels)
        channels_of = dict(zip(MIXTURES, (own, own, further), strict=True)) if num_gaussians else {}
        self.mixtures: Any = nn.ModuleDict(
            {name: FeatureMixture(channels, num_gaussians) for name, channels in channels_of.items() if channels}
        )
        self.layers = self.features.layers
        widths = [math.ceil(width * channels / self.features.channels[0]) for channels in self.features.channels]
        networks = list(zip(self.features.channels, widths, strict=True))
        self.teachers = (
            nn.ModuleList(
                FlowTeacher(channels, POSITIONAL_CHANNELS, flow_steps, hidden) for channels, hidden in networks
            )
            if flow_steps
            else None
        )
        self.students = (
            nn.ModuleList(
                DenoisingStudent(channels, POSITIONAL_CHANNELS, hidden, student_blocks, frequency_branch)
                for channels, hidden in networks
            )
            if student_blocks
            else None
        )
        *finer, coarsest = self.layers
        weights_of_maps = dict.fromkeys(finer, FINER / max(1, len(finer))) | {coarsest: COARSEST}
        weights_of_maps |= {name: MIXTURES[name] for name in self.mixtures}
        total = sum(weights_of_maps.values())
        shares = {name: weight / total for name, weight in weights_of_maps.items()}
        self.anomaly_map_generator = AnomalyMapGenerator(shares, image_score)
        self.to(memory_format=torch.channels_last)

    def _inputs(self, features: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield what teacher and student see, at the coarsest layer averages, with the encoding of the positions."""
        *finer, coarsest = features[: len(self.layers)]
        for feature in (*finer, *average([coarsest])):
            height, width = feature.shape[-2:]
            encoding = build_sincos2d_pos_embed([height, width], POSITIONAL_CHANNELS, device=feature.device)
            yield feature, encoding.mT.reshape(1, POSITIONAL_CHANNELS, height, width)

    def teach(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run the teacher for its own training.

        Args:
            features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a layer.

        Returns:
            tuple[list[torch.Tensor], list[torch.Tensor]]: For each layer, a latent map of the features' shape and
                log-determinants of shape ``(B,)``.

        Raises:
            RuntimeError: If the model has no teacher.
        """
        if self.teachers is None:
            msg = "The model has no teacher (flow_steps is 0)."
            raise RuntimeError(msg)
        outputs = [teacher(*inputs) for teacher, inputs in zip(self.teachers, self._inputs(features), strict=True)]
        return [latent for latent, _ in outputs], [log_det for _, log_det in outputs]

    def respond(self, features: list[torch.Tensor]) -> Responses:
        """Run the frozen teacher, and the student: on noisy features in training, on clean ones in evaluation.

        Args:
            features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a layer.

        Returns:
            Responses: The features and both networks' answers to them.
        """
        inputs = list(self._inputs(features))
        latents = [feature for feature, _ in inputs]
        if self.teachers is not None:
            with torch.no_grad():
                latents = [
                    teacher(feature, encoding, log_det=False)[0]
                    for teacher, (feature, encoding) in zip(self.teachers, inputs, strict=True)
                ]
        if self.students is None:
            return Responses(features, latents, [torch.zeros_like(latent) for latent in latents])
        if self.training and self.noise_std:
            inputs = [(add_region_noise(feature, self.noise_std), encoding) for feature, encoding in inputs]
        predictions = [student(*pair) for student, pair in zip(self.students, inputs, strict=True)]
        return Responses(features, latents, predictions)

    def distances(self, responses: Responses) -> dict[str, torch.Tensor]:
        """Compute how anomalous each position is: how far teacher and student differ, how far the mixtures are.

        Args:
            responses (Responses): See ``respond``.

        Returns:
            dict[str, torch.Tensor]: Means over channels of squared distances, a map of shape ``(B, 1, h, w)`` for each
                layer, and for each mixture one of the coarsest layer's shape, by their names.
        """
        pairs = zip(self.layers, responses.teacher, responses.student, strict=True)
        distances = {layer: (teacher - student).square().mean(dim=1, keepdim=True) for layer, teacher, student in pairs}
        for name, mixture in self.mixtures.items():
            distances[name] = mixture(self._seen(name, responses.features))
        return distances

    def _seen(self, mixture: str, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return which of the features a mixture sees, and how."""
        if mixture == "further_mixture":
            return features[len(self.layers) :]
        own = features[: len(self.layers)]
        return average(own) if mixture == "averaged_mixture" else own

    def score(self, responses: Responses, image_size: tuple[int, int]) -> InferenceBatch:
        """Turn the responses to images into anomaly maps and image scores.

        Args:
            responses (Responses): See ``respond``.
            image_size (tuple[int, int]): Height and width of the anomaly map.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(B, 1)`` and ``anomaly_map`` of shape ``(B, 1, H, W)``, both
                unbounded, higher for more anomalous.
        """
        return self.anomaly_map_generator(self.distances(responses), image_size)

    def halves(self, responses: Responses, image_size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Split the anomaly map into what the features as they are say, and what averaged or a second backbone's say.

        Args:
            responses (Responses): See :meth:`respond`.
            image_size (tuple[int, int]): Height and width of the maps.

        Returns:
            dict[str, torch.Tensor]: ``"fine"`` and ``"coarse"``, each of shape ``(B, 1, H, W)``, or the only one that
                the model has. The map is their mean, weighted by what they consist of, so its thresholds suit them.
        """
        weights = self.anomaly_map_generator.weights
        halves: dict[str, list[str]] = {"fine": [], "coarse": []}
        for name in weights:
            coarse = name in {self.layers[-1], "averaged_mixture", "further_mixture"}
            halves["coarse" if coarse else "fine"].append(name)
        parts = self.anomaly_map_generator.parts(self.distances(responses))
        return {
            half: resize(torch.stack([parts[name] for name in names]).sum(0), *image_size)
            / sum(weights[name] for name in names)
            for half, names in halves.items()
            if names
        }

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Detect anomalies.

        Args:
            images (torch.Tensor): Images of shape ``(B, 3, H, W)`` with values in ``[0, 1]``.

        Returns:
            InferenceBatch: See ``score``.
        """
        height, width = images.shape[-2:]
        return self.score(self.respond(self.features(images)), (height, width))

    @torch.no_grad()
    def calibrate(self, batches: Callable[[], Iterable[list[torch.Tensor]]]) -> None:
        """Fit what is not trained by gradients: the mixtures, then the statistics of the distances.

        Args:
            batches (Callable[[], Iterable[list[torch.Tensor]]]): Gives the standardised features of the training
                images, once for each pass over them.
        """
        training = self.training
        self.eval()
        for name, mixture in self.mixtures.items():
            mixture.fit(self._seen(name, features) for features in batches())
        self.anomaly_map_generator.fit(self.distances(self.respond(features)) for features in batches())
        self.train(training)
