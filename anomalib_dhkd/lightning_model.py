# SPDX-License-Identifier: Apache-2.0

"""DHKD: Denoised Heterogeneous Knowledge Distillation.

Reimplemented from the published abstract of "Unsupervised Image Anomaly Detection with Denoised Heterogeneous Networks
via Knowledge Distillation"; the paper's code, hyper-parameters and full text are not public.

Example:
    >>> from anomalib.engine import Engine
    >>> from anomalib_dhkd import Dhkd, MVTec
    >>> engine = Engine()
    >>> engine.train(model=Dhkd(), datamodule=MVTec(category="bottle"))  # doctest: +SKIP
"""

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import nn
from torch.optim import Adam
from torchvision.transforms.v2 import Resize

from .budget import fit_into
from .checkpoint import CheckpointMixin
from .components.seeding import seeded
from .export import FaithfulExportMixin
from .feature_cache import FeatureBatch, FeatureCache
from .loss import AffinityLoss, DistillationLoss, FlowLoss
from .metrics import DefinedEvaluator, ResponseShift, test_metrics
from .post_processor import RankPreservingPostProcessor
from .pre_processor import AntialiasingPreProcessor
from .preflight import Preflight, check_given
from .resume import ResumableMixin, TrainingEnd
from .run_report import RunReport
from .torch_model import DhkdModel
from .views import Views
from .visualizer import PathVisualizer

LEARNING_RATE = 1e-2
"""Peak learning rate of Adam; a third of it detects the same, three times as much less."""


class Dhkd(ResumableMixin, CheckpointMixin, FaithfulExportMixin, AnomalibModule):  # anomalib lists direct subclasses
    """Lightning module of DHKD.

    The teacher is trained first, then the student on the frozen teacher, in one ``fit``. Training ends by itself after
    ``train_steps`` optimiser steps, rounded up to whole epochs. The trainer's ``max_epochs`` and ``max_steps`` can only
    shorten it; both phases then shrink in proportion. The model is calibrated before each validation, which sets
    threshold and normalisation: once, at the end, unless ``check_val_every_n_epoch`` is above 1 or
    ``val_check_interval`` is given. See ``anomalib_dhkd.resume.TrainingEnd`` for trainings that are cut short.

    Args:
        backbone (Sequence[str] | str): Name of a timm model, or of two; the second has a mixture alone. Weights of
            ``efficientnet_lite0_bundled`` come with this package, of ``efficientnet_lite{1,2}_bundled`` with its extra
            ``lite``; timm downloads others. Defaults to ``"efficientnet_lite0_bundled"``.
        layers (Sequence[Sequence[str]] | Sequence[str]): Layers of the backbone, finest first, each one scale; of two
            backbones a list each. Defaults to ``("blocks.2", "blocks.4")``.
        weights (Sequence[str | Path | None] | str | Path | None): Local file with the timm model's state dict, of two
            backbones a list. Defaults to ``None``.
        width (int): Channels inside teacher and student at the first layer, at least 1; at the other layers in
            proportion to their own channels. More take longer. Defaults to ``64``.
        flow_steps (int): Couplings of the normalising-flow teacher. 0 switches the flow off: the student then learns
            the standardised features themselves. Defaults to ``2``.
        student_blocks (int): Dual-domain blocks of the student. 0 switches the student off: the teacher's likelihood
            then takes the place of their difference, and the teacher trains for the whole budget. Defaults to ``1``.
        frequency_branch (bool): Reconstruct in the frequency domain, too. Defaults to ``False``, by measurement.
        noise_std (float): Gaussian noise on the student's features in training, in standard deviations of a channel; 0
            switches it off. Defaults to ``0.2``.
        affinity_weight (float): Weight of the teacher-student affinity loss. Defaults to ``0.0``, by measurement.
        num_gaussians (int): Local Gaussians of each of the two mixtures over the features of all layers, plain and
            averaged ones. 0 switches them off. Defaults to ``384``.
        image_score (str): How the image score is read off the map: ``"mean"``, ``"max"``, ``"topk"``, the mean of the
            highest hundredth of its positions, or ``"contrast"``, the same less a part of the mean, the default.
        num_views (int): Changed views of each training image that are trained on, too; 0 for none. Defaults to ``3``.
        view_transform (nn.Module | None): Makes a view of an image of shape ``(1, 3, H, W)``, as transforms of kornia
            and torchvision do. Defaults to ``None``, for ``anomalib_dhkd.views.light_views``.
        train_steps (int): Budget of optimiser steps for both phases together, at least 2. Defaults to ``400``.
        cache_limit (float | None): GiB of memory for the features of the training images, above which they are kept in
            a temporary file; ``None`` extracts them at every step, as with augmentations. Defaults to ``2.0``.
        seed (int | None): What all random numbers of the training follow from, at least 0. Defaults to ``None``, for
            PyTorch's own seed, which ``lightning.seed_everything`` sets but anomalib's command line doesn't.
        pre_processor (PreProcessor | bool, optional): Pre-processor instance, which keeps images in [0, 1], or flag to
            use default. Defaults to ``True``.
        post_processor (PostProcessor | bool, optional): Post-processor instance or flag to use default.
            Defaults to ``True``.
        evaluator (Evaluator | bool, optional): Evaluator instance or flag to use default. Defaults to ``True``.
        visualizer (Visualizer | bool, optional): Visualizer instance or flag to use default. Defaults to ``True``.

    Raises:
        ValueError: If an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        backbone: Sequence[str] | str = "efficientnet_lite0_bundled",
        layers: Sequence[Sequence[str]] | Sequence[str] = ("blocks.2", "blocks.4"),
        weights: Sequence[str | Path | None] | str | Path | None = None,
        width: int = 64,
        flow_steps: int = 2,
        student_blocks: int = 1,
        frequency_branch: bool = False,
        noise_std: float = 0.2,
        affinity_weight: float = 0.0,
        num_gaussians: int = 384,
        image_score: Literal["mean", "max", "topk", "contrast"] = "contrast",
        num_views: int = 3,
        view_transform: nn.Module | None = None,
        train_steps: int = 400,
        cache_limit: float | None = 2.0,
        seed: int | None = None,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        check_given(type(self), self.hparams)
        given = {"affinity_weight": (affinity_weight, 0), "train_steps": (train_steps, 2), "seed": (seed or 0, 0)}
        for name, (value, least) in given.items():
            if not value >= least:
                msg = f"{name} must be at least {least}, got {value!r}."
                raise ValueError(msg)
        self.hparams.pop("view_transform")  # a checkpoint holds plain data; its model needs no more views
        self.views = Views(num_views, view_transform)
        self.run_report = RunReport()
        with seeded(seed):
            self.build()

    def build(self) -> None:
        """Make network, losses and cache from the arguments in ``hparams``."""
        arguments = self.hparams
        network = {name: arguments[name] for name in signature(DhkdModel).parameters if name in arguments}
        self.model: DhkdModel = DhkdModel(**network | {"weights": None, "pre_trained": False})
        networks = {"teacher": self.model.teachers, "student": self.model.students}
        existing = [name for name, network in networks.items() if network is not None]
        self.shifts: Any = nn.ModuleDict({name: ResponseShift(self.model.features.channels) for name in existing})
        self.flow_loss = FlowLoss()
        self.distillation_loss = DistillationLoss()
        self.affinity_loss = AffinityLoss() if arguments["affinity_weight"] else None
        self.views.number = arguments["num_views"]
        self.feature_cache = FeatureCache(arguments["cache_limit"], self.views)

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Return DHKD trainer arguments; the length of training isn't among them, so that users can shorten it."""
        return {"gradient_clip_val": 1.0, "num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """Return the learning type of the model."""
        return LearningType.ONE_CLASS

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Configure the default pre-processor, which only resizes: the backbone's own normalisation is in the model.

        Args:
            image_size (tuple[int, int] | None, optional): Height and width. Defaults to ``(320, 320)``.

        Returns:
            PreProcessor: Configured pre-processor.
        """
        return AntialiasingPreProcessor(transform=Resize(image_size or (320, 320), antialias=True))

    def configure_post_processor(self) -> PostProcessor:
        """Configure the default post-processor.

        Returns:
            PostProcessor: One that keeps the order of scores.
        """
        return RankPreservingPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the default evaluator, with the metrics of ``anomalib_dhkd.metrics.test_metrics``."""
        return DefinedEvaluator(test_metrics=test_metrics())

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Configure the default visualizer.

        Returns:
            ImageVisualizer: One whose pictures follow the images' paths.
        """
        return PathVisualizer()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Configure anomalib's callbacks, and those that check what is given, keep features, finish and report.

        Returns:
            Sequence[Callback]: Callbacks.
        """
        callbacks: Any = super().configure_callbacks()
        return [*callbacks, Preflight(), self.feature_cache, TrainingEnd(), self.run_report]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure Adam with one parameter group and one learning-rate schedule a phase.

        Returns:
            OptimizerLRScheduler: Optimiser and scheduler.
        """
        candidates = {"teacher": self.model.teachers, "student": self.model.students}
        networks = {name: network for name, network in candidates.items() if network is not None}
        self.budget = fit_into(self.trainer, self.hparams["train_steps"], networks)
        groups = [{"params": [p for p in network.parameters() if p.requires_grad]} for network in networks.values()]
        optimizer = Adam(groups, lr=LEARNING_RATE)
        schedule = self.budget.schedule(optimizer, networks)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def phase(self) -> Literal["teacher", "student"]:
        """Return the network that the next optimiser step trains."""
        return self.budget.phase(self.trainer.global_step)

    def on_train_start(self) -> None:
        """Estimate the channel statistics, unless the run was resumed and has them already."""
        if self.trainer.global_step == 0:
            self.model.features.fit(self.feature_cache.batches(self.trainer, self))

    def training_step(self, batch: Batch | FeatureBatch, *args, **kwargs) -> STEP_OUTPUT:
        """Train the network of the current phase, and log it: 1 is the teacher's, 2 the student's.

        Args:
            batch (Batch | FeatureBatch): Images, or their features from the cache.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: Dictionary with the loss.
        """
        features = self.model.features.standardise(self.feature_cache.features(batch, self))
        losses: dict[str, Any] = {"phase": 1.0 if self.phase == "teacher" else 2.0}  # loggers take numbers only
        if self.phase == "teacher":
            loss = self.flow_loss(*self.model.teach(features))
            losses["teacher_loss"] = loss
        else:
            responses = self.model.respond(features)
            loss = self.distillation_loss(responses.teacher, responses.student)
            losses["student_loss"] = loss
            if self.affinity_loss:
                affinity = self.affinity_loss(responses.teacher, responses.student)
                loss = loss + self.hparams["affinity_weight"] * affinity
                losses["affinity_loss"] = affinity
        self.log_dict(losses, prog_bar=True, batch_size=len(features[0]))
        return {"loss": loss}

    def calibrate(self) -> None:
        """Fit the mixtures and the statistics of the distances to the training images, as the networks are now."""
        batches = self.feature_cache.batches
        self.model.calibrate(lambda: map(self.model.features.standardise, batches(self.trainer, self)))
        self.calibrated_step = self.trainer.global_step

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Compute anomaly maps and scores.

        Args:
            batch (Batch): Input batch.
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: The batch with predictions.
        """
        return batch.update(**self.model(batch.image)._asdict())

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> STEP_OUTPUT:
        """Compute anomaly maps and scores, and how far the responses move on anomalies.

        Args:
            batch (Batch): Input batch.
            batch_idx (int): Index of the batch (unused).
            *args: Unused.
            **kwargs: Unused.

        Returns:
            STEP_OUTPUT: The batch with predictions.
        """
        image: Any = batch.image
        labels: Any = batch.gt_label
        responses = self.model.respond(self.model.features(image))
        for name, shift in self.shifts.items():
            shift.update(getattr(responses, name), labels, batch.gt_mask)
        return batch.update(**self.model.score(responses, image.shape[-2:])._asdict())

    def on_test_epoch_end(self) -> None:
        """Log the paper's objective: the teacher's response should move on anomalies, the student's should not."""
        for name, shift in self.shifts.items():
            self.log(f"{name}_shift", shift)
