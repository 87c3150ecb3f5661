# SPDX-License-Identifier: Apache-2.0

"""DHKD as a plain PyTorch model.

Reimplemented from the published abstract of "Unsupervised Image Anomaly Detection with Denoised Heterogeneous Networks
via Knowledge Distillation". An invertible flow (the teacher) and a denoising feed-forward network (the student) look
at the same frozen features; where they disagree, the image is anomalous.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from torch import nn

from .anomaly_map import AnomalyMapGenerator
from .components.features import FeaturePyramid
from .components.memory import FeatureMemory
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
        student_blocks (int): Dual-domain blocks of the student; with 0 there is no student, and the anomaly map is
            the teacher's likelihood.
        student_channels (int): Width of the student at the first layer; at the others in proportion likewise.
        frequency_branch (bool): Whether the student's blocks have their frequency branch.
        noise_std (float): Standard deviation of the feature noise in training, 0 for none.
        noise_coverage (float): Expected share of positions with noise.
        memory (int): Features of training positions that are kept, and to which those of an image are compared; 0 for
            none.
        likelihood (bool): Whether the teacher's likelihood at the coarsest scale votes on the image score, beside the
            distances of teacher and student. Without a teacher or a student it can't.
        calibration (bool): Whether the votes are calibrated on training statistics before fusion.
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
        memory: int,
        likelihood: bool,
        calibration: bool,
        image_score: str,
    ) -> None:
        super().__init__()
        self.features = FeaturePyramid(backbone, layers, pre_trained, weights)
        self.positional_channels = positional_channels
        self.noise_std = noise_std
        self.noise_coverage = noise_coverage
        channels = self.features.channels
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
        self.likelihood = likelihood and self.teachers is not None and self.students is not None
        self.memory = FeatureMemory(sum(channels), memory) if memory else None
        map_weights, score_weights = _weights(len(channels), self.likelihood, self.memory is not None)
        self.anomaly_map_generator = AnomalyMapGenerator(map_weights, score_weights, calibration, image_score)
        self.to(memory_format=torch.channels_last)

    def _conditions(self, features: list[torch.Tensor]) -> list[torch.Tensor | None]:
        if not self.positional_channels:
            return [None] * len(features)
        return [
            sinusoidal_encoding(self.positional_channels, feature.shape[-2], feature.shape[-1], feature.device)
            for feature in features
        ]

    def teach(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run the teacher for its own training.

        Args:
            features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a scale.

        Returns:
            tuple[list[torch.Tensor], list[torch.Tensor]]: Latent maps of the features' shapes, and log-determinants
                of shape ``(B,)``.

        Raises:
            RuntimeError: If the model has no teacher.
        """
        if self.teachers is None:
            msg = "The model has no teacher (flow_steps is 0)."
            raise RuntimeError(msg)
        conditions = self._conditions(features)
        outputs = [teacher(*inputs) for teacher, *inputs in zip(self.teachers, features, conditions, strict=True)]
        return [latent for latent, _ in outputs], [log_det for _, log_det in outputs]

    def respond(self, features: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run the frozen teacher, and the student: on noisy features in training, on clean ones in evaluation.

        Args:
            features (list[torch.Tensor]): Standardised features, a map of shape ``(B, C, h, w)`` a scale.

        Returns:
            tuple[list[torch.Tensor], list[torch.Tensor]]: Responses of the teacher and of the student, of the features'
                shapes. Without a flow the features take the teacher's place; without a student its responses are zeros.
        """
        conditions = self._conditions(features)
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
        r"""Compute how anomalous each position of each scale is.

        That is the squared difference of teacher and student; with ``likelihood`` at the coarsest scale also the
        teacher's negative log-likelihood :math:`\tfrac{1}{2} \lVert z \rVert^2`, up to a factor and the
        log-determinant (that of finer scales was measured too, and makes scores worse where parts turn); with a memory
        the squared distance to the nearest feature in it.

        Args:
            features (list[torch.Tensor]): Standardised features.
            latents (list[torch.Tensor]): Responses of the teacher to them.
            predictions (list[torch.Tensor]): Responses of the student to them.

        Returns:
            list[torch.Tensor]: Means over channels, a map of shape ``(B, 1, h, w)`` a scale, and one more of the last
                scale's shape for the likelihood and for the memory each.
        """
        differences = [teacher - student for teacher, student in zip(latents, predictions, strict=True)]
        votes = [*differences, latents[-1]] if self.likelihood else differences
        distances = [vote.square().mean(dim=1, keepdim=True) for vote in votes]
        return distances if self.memory is None else [*distances, self.memory(features)]

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
    def calibrate(self, batches: Iterable[list[torch.Tensor]]) -> None:
        """Take the statistics for calibrating the votes from training images.

        Args:
            batches (Iterable[list[torch.Tensor]]): Standardised features of the training images.
        """
        training = self.training
        self.eval()
        self.anomaly_map_generator.fit(self.distances(features, *self.respond(features)) for features in batches)
        self.train(training)


def _weights(scales: int, likelihood: bool, memory: bool) -> tuple[list[float], list[float]]:
    """Return the weight of each distance map in the anomaly map and in the image score.

    The likelihood votes on the image score alone. The memory makes up half of the image score, and in the anomaly map
    takes the place of the coarsest scale, on whose grid it is; chosen by measurement, see ``docs/results.md``.
    """
    votes = scales + likelihood
    if not memory:
        return [1 / scales] * scales + [0.0] * likelihood, [1 / votes] * votes
    seen = max(1, scales - 1)
    in_map = [1 / (seen + 1)] * seen + [0.0] * (votes - seen) + [1 / (seen + 1)]
    return in_map, [0.5 / votes] * votes + [0.5]
