# SPDX-License-Identifier: Apache-2.0

"""DHKD as a plain PyTorch model.

Reimplemented from the published abstract of "Unsupervised Image Anomaly Detection with Denoised Heterogeneous Networks
via Knowledge Distillation". An invertible flow (the teacher) and a denoising feed-forward network (the student) look
at the same frozen features; where they disagree, the image is anomalous.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from torch import nn

from .anomaly_map import AnomalyMapGenerator
from .components.features import FeaturePyramid
from .components.mixture import FeatureMixture
from .components.positional_encoding import sinusoidal_encoding
from .components.student import DenoisingStudent, add_region_noise
from .components.teacher import FlowTeacher


class DhkdModel(nn.Module):
    """Frozen features, flow teacher, denoising student and the anomaly map of their differences.

    Args:
        backbone (str): See :class:`~anomalib_dhkd.components.features.FeaturePyramid`.
        layers (Sequence[str]): Layers of the backbone, one scale each.
        pre_trained (bool): Load ImageNet weights into the backbone.
        weights (str | Path | None): Local file with the backbone's weights.
        positional_channels (int): Channels of the positional encoding that conditions teacher and student, 0 for none.
        flow_steps (int): Couplings of the teacher; with 0 the standardised features take the teacher's place.
        flow_channels (int): Width of the teacher's coupling subnets at the first layer; at the others in proportion to
            the layers' channels.
        student_blocks (int): Dual-domain blocks of the student; with 0 there is no student, and the teacher's
            likelihood takes the place of their difference.
        student_channels (int): Width of the student at the first layer; at the others in proportion likewise.
        frequency_branch (bool): Whether the student's blocks have their frequency branch.
        noise_std (float): Standard deviation of the feature noise in training, 0 for none.
        noise_coverage (float): Expected share of positions with noise.
        mixture (int): Local Gaussians of the mixture over the features of all scales, which takes the place of teacher
            and student at the coarsest scale, unless that is the only one; 0 for none.
        calibration (bool): Whether the distances are calibrated on training statistics before fusion.
        image_score (str): See :class:`~anomalib_dhkd.anomaly_map.AnomalyMapGenerator`.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        pre_trained: bool,
        weights: str | Path | None,
        positional_channels: int,
        flow_steps: int,
        flow_channels: int,
        student_blocks: int,
        student_channels: int,
        frequency_branch: bool,
        noise_std: float,
        noise_coverage: float,
        mixture: int,
        calibration: bool,
        image_score: str,
    ) -> None:
        super().__init__()
        self.features = FeaturePyramid(backbone, layers, pre_trained, weights)
        self.positional_channels = positional_channels
        self.noise_std = noise_std
        self.noise_coverage = noise_coverage
        self.mixture = FeatureMixture(sum(self.features.channels), mixture) if mixture else None
        channels = self.features.channels[:-1] if mixture and len(layers) > 1 else self.features.channels
        self.distilled_channels = channels
        self.teachers = (
            nn.ModuleList(
                FlowTeacher(count, positional_channels, flow_steps, math.ceil(flow_channels * count / channels[0]))
                for count in channels
            )
            if flow_steps
            else None
        )
        self.students = (
            nn.ModuleList(
                DenoisingStudent(
                    count,
                    positional_channels,
                    math.ceil(student_channels * count / channels[0]),
                    student_blocks,
                    frequency_branch,
                )
                for count in channels
            )
            if student_blocks
            else None
        )
        # The mixture, which sees all layers, makes up three fifths of the map (docs/results.md).
        map_weights = [1] * len(channels) + [1.5 * len(channels)] * bool(mixture)
        self.anomaly_map_generator = AnomalyMapGenerator(map_weights, calibration, image_score)
        self.to(memory_format=torch.channels_last)

    def _inputs(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Return the features that teacher and student see, and the positional encodings for them."""
        features = features[: len(self.distilled_channels)]
        if not self.positional_channels:
            return features, [None] * len(features)
        return features, [
            sinusoidal_encoding(self.positional_channels, feature.shape[-2], feature.shape[-1], feature.device)
            for feature in features
        ]

    def teach(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run the teacher for its own training.

        Args:
            features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a scale.

        Returns:
            tuple[list[torch.Tensor], list[torch.Tensor]]: For each scale that has a teacher, a latent map of the
                features' shape and log-determinants of shape ``(B,)``.

        Raises:
            RuntimeError: If the model has no teacher.
        """
        if self.teachers is None:
            msg = "The model has no teacher (flow_steps is 0)."
            raise RuntimeError(msg)
        features, conditions = self._inputs(features)
        outputs = [teacher(*inputs) for teacher, *inputs in zip(self.teachers, features, conditions, strict=True)]
        return [latent for latent, _ in outputs], [log_det for _, log_det in outputs]

    def respond(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run the frozen teacher, and the student: on noisy features in training, on clean ones in evaluation.

        Args:
            features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a scale.

        Returns:
            tuple[list[torch.Tensor], list[torch.Tensor]]: Responses of the teacher and of the student, of the features'
                shapes, at the scales that have them. Without a flow the features take the teacher's place; without a
                student its responses are zeros.
        """
        features, conditions = self._inputs(features)
        latents = features
        if self.teachers is not None:
            with torch.no_grad():
                latents = [
                    teacher(*inputs, log_det=False)[0]
                    for teacher, *inputs in zip(self.teachers, features, conditions, strict=True)
                ]
        if self.students is None:
            return latents, [torch.zeros_like(latent) for latent in latents]
        if self.training and self.noise_std:
            features = [add_region_noise(feature, self.noise_std, self.noise_coverage) for feature in features]
        return latents, [student(*inputs) for student, *inputs in zip(self.students, features, conditions, strict=True)]

    def distances(
        self,
        features: list[torch.Tensor],
        latents: list[torch.Tensor],
        predictions: list[torch.Tensor],
    ) -> list[torch.Tensor]:
        """Compute how anomalous each position of each scale is.

        That is the squared difference of teacher and student, and with a mixture the distance of the features from it.

        Args:
            features (list[torch.Tensor]): Standardised features.
            latents (list[torch.Tensor]): Responses of the teacher to them.
            predictions (list[torch.Tensor]): Responses of the student to them.

        Returns:
            list[torch.Tensor]: Means over channels, a map of shape ``(B, 1, h, w)`` for each scale that has a teacher
                or student, and one of the coarsest scale's shape for the mixture.
        """
        distances = [
            (teacher - student).square().mean(dim=1, keepdim=True)
            for teacher, student in zip(latents, predictions, strict=True)
        ]
        return distances if self.mixture is None else [*distances, self.mixture(features)]

    def score(
        self,
        features: list[torch.Tensor],
        latents: list[torch.Tensor],
        predictions: list[torch.Tensor],
        image_size: tuple[int, int],
    ) -> InferenceBatch:
        """Turn features and the responses to them into an anomaly map and an image score.

        Args:
            features (list[torch.Tensor]): Standardised features.
            latents (list[torch.Tensor]): Responses of the teacher to them.
            predictions (list[torch.Tensor]): Responses of the student to them.
            image_size (tuple[int, int]): Height and width of the anomaly map.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(B, 1)`` and ``anomaly_map`` of shape ``(B, 1, H, W)``, both
                unbounded, higher for more anomalous.
        """
        return self.anomaly_map_generator(self.distances(features, latents, predictions), image_size)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Detect anomalies.

        Args:
            images (torch.Tensor): Images of shape ``(B, 3, H, W)`` with values in ``[0, 1]``.

        Returns:
            InferenceBatch: See :meth:`score`.
        """
        height, width = images.shape[-2:]
        features = self.features(images)
        return self.score(features, *self.respond(features), (height, width))

    @torch.no_grad()
    def calibrate(self, batches: Callable[[], Iterable[list[torch.Tensor]]]) -> None:
        """Fit what is not trained by gradients: the mixture, then the statistics of the distances.

        Args:
            batches (Callable[[], Iterable[list[torch.Tensor]]]): Gives the standardised features of the training
                images, once for each pass over them.
        """
        training = self.training
        self.eval()
        if self.mixture is not None:
            self.mixture.fit(batches())
        self.anomaly_map_generator.fit(self.distances(features, *self.respond(features)) for features in batches())
        self.train(training)
