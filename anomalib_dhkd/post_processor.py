# SPDX-License-Identifier: Apache-2.0

"""Normalisation that keeps the order of scores, and a threshold from good images alone."""

import math
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, ValSplitMode
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torchmetrics import CatMetric

from .thresholds import ImageThreshold, PixelThreshold


class RankPreservingPostProcessor(PostProcessor):
    r"""Map scores to [0, 1] without ties, so that metrics on them are those of the raw scores.

    With the smallest and the largest validation score, the threshold :math:`t` and the range :math:`r` that the three
    span, a score :math:`x` becomes

    .. math::
        g(x) = \begin{cases} 1 - \frac{1}{2 (1 + u)} & u \ge 0 \\ \frac{1}{2 (1 - u)} & u < 0 \end{cases}
        \qquad u = \frac{4 (x - t)}{r} .

    The threshold becomes 0.5 and the validation range lies within 0.1 and 0.9; scores beyond it approach 0 and 1. Each
    floating-point operation is monotone, so the order of two scores is never reversed. As in anomalib, a sensitivity
    :math:`s` puts the threshold of the normalised scores at :math:`1 - s`.

    Thresholds maximise F1 on validation images, as anomalib's do, see ``anomalib_dhkd.thresholds``, unless
    ``false_alarm_rate`` is given. Then they come from the good validation images alone: of :math:`n` scores, the image
    threshold is the :math:`\lceil (n + 1) (1 - \alpha) \rceil`-th smallest, and the pixel threshold is the same of the
    highest pixels of the :math:`n` maps. A good image then has an image score, and likewise any pixel, above its
    threshold with a probability of at most :math:`\alpha` (split conformal prediction, Vovk et al., 2005), whatever the
    scores' distribution, if it is drawn from where the validation images were drawn from. The images must not have been
    trained on, nor be tested on: give the data module ``val_split_mode="from_train"``.

    Attributes:
        normal_image_scores (list[float]): Sorted raw scores of the good validation images that aren't tested on.
        normal_pixel_scores (list[float]): The same of the highest pixels of their maps.
        good_image_scores (list[float]): Those of all good validation images, also where they are tested on. No
            threshold follows from them; they show what scores good images have.

    Args:
        false_alarm_rate (float | None): Rate :math:`\alpha` of false alarms among good images, above 0 and below 1. It
            needs at least :math:`1 / \alpha - 1` good validation images and can be changed on a trained model.
            Defaults to ``None``.
        **kwargs: Arguments of ``anomalib.post_processing.PostProcessor``.

    Raises:
        ValueError: If ``false_alarm_rate`` is out of its range.

    Example:
        >>> post_processor = RankPreservingPostProcessor(false_alarm_rate=0.05)
        >>> post_processor.normal_image_scores = [float(score) for score in range(39)]
        >>> post_processor.image_threshold
        tensor(37.)
    """

    KEPT = ("false_alarm_rate", "normal_image_scores", "normal_pixel_scores", "good_image_scores")
    """Attributes that a checkpoint keeps."""

    def __init__(self, false_alarm_rate: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if false_alarm_rate is not None and not 0 < false_alarm_rate < 1:
            msg = f"false_alarm_rate must be above 0 and below 1, or None, got {false_alarm_rate!r}."
            raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        self.normal_image_scores: list[float] = []
        self.normal_pixel_scores: list[float] = []
        self.good_image_scores: list[float] = []
        self._image_threshold_metric = ImageThreshold(fields=["pred_score", "gt_label"], strict=False)
        pixel_threshold: Any = PixelThreshold(fields=["anomaly_map", "gt_mask"], strict=False)
        self._pixel_threshold_metric = pixel_threshold
        self._normal_image_metric = CatMetric()
        self._normal_pixel_metric = CatMetric()

    def checkpoint_config(self) -> dict[str, Any]:
        """Get plain-data configuration to persist in a checkpoint.

        Returns:
            dict[str, Any]: anomalib's, the false-alarm rate and the good scores that its thresholds come from.
        """
        return super().checkpoint_config() | {name: getattr(self, name) for name in self.KEPT}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore configuration previously returned by ``checkpoint_config``.

        Args:
            config (dict[str, Any]): Plain-data configuration to restore.
        """
        super().load_checkpoint_config(config)
        for name in self.KEPT:
            if name in config:
                setattr(self, name, config[name])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check before training that the validation images can give the false-alarm threshold.

        Args:
            trainer (Trainer): Lightning trainer.
            pl_module (LightningModule): Model.
            stage (str): Lightning's stage.

        Raises:
            ValueError: If validation images are test images, or good ones are too few.
        """
        del pl_module  # Unused argument.
        datamodule: Any = getattr(trainer, "datamodule", None)
        if self.false_alarm_rate is None or stage not in {"fit", "validate"}:
            return
        if not isinstance(datamodule, AnomalibDataModule):
            return
        if datamodule.val_split_mode == ValSplitMode.SAME_AS_TEST:
            msg = (
                f"false_alarm_rate={self.false_alarm_rate} needs good validation images that aren't tested on, but the "
                "data module has val_split_mode='same_as_test'; 'from_train' holds out training images."
            )
            raise ValueError(msg)
        val_data: Any = getattr(datamodule, "val_data", None)  # missing with val_split_mode='none'
        count = 0 if val_data is None else int((val_data.samples.label_index == LabelName.NORMAL).sum())
        conformal_rank(count, self.false_alarm_rate)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        *args,
        **kwargs,
    ) -> None:
        """Collect the scores of the batch.

        Args:
            trainer (Trainer): Lightning trainer.
            pl_module (LightningModule): Model.
            outputs (Batch): The batch with raw predictions and ground truth.
            *args: Passed on.
            **kwargs: Passed on.
        """
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        if outputs.gt_label is None:
            return
        # Also where none is good: with several devices, all must take part in gathering.
        normal = ~outputs.gt_label.bool()
        self._normal_image_metric.update(outputs.pred_score[normal].flatten())
        if outputs.anomaly_map is not None:
            self._normal_pixel_metric.update(outputs.anomaly_map[normal].flatten(1).amax(dim=1))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set thresholds and range.

        Args:
            trainer (Trainer): Lightning trainer.
            pl_module (LightningModule): Model.
        """
        super().on_validation_epoch_end(trainer, pl_module)
        images, pixels = _gathered(self._normal_image_metric), _gathered(self._normal_pixel_metric)
        if images:
            self.good_image_scores = images
        datamodule: Any = getattr(trainer, "datamodule", None)
        if images and getattr(datamodule, "val_split_mode", None) != ValSplitMode.SAME_AS_TEST:
            self.normal_image_scores, self.normal_pixel_scores = images, pixels

    @property
    def image_threshold(self) -> torch.Tensor:
        """Get the image threshold.

        Returns:
            torch.Tensor: Threshold of raw image scores, of shape ``()``.

        Raises:
            ValueError: If there are too few good scores for the false-alarm rate.
        """
        if self.false_alarm_rate is None:
            return super().image_threshold
        return self._false_alarm_threshold(self.normal_image_scores, self.false_alarm_rate)

    @property
    def pixel_threshold(self) -> torch.Tensor:
        """Get the pixel threshold.

        Returns:
            torch.Tensor: Threshold of raw anomaly maps, of shape ``()``.

        Raises:
            ValueError: If there are too few good maps for the false-alarm rate.
        """
        if self.false_alarm_rate is None:
            return super().pixel_threshold
        return self._false_alarm_threshold(self.normal_pixel_scores, self.false_alarm_rate)

    def _false_alarm_threshold(self, scores: list[float], false_alarm_rate: float) -> torch.Tensor:
        """Return the threshold of sorted good scores, on this module's device."""
        return torch.full_like(self.image_min, scores[conformal_rank(len(scores), false_alarm_rate) - 1])

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        """Normalise scores. anomalib has no public way to replace this mapping alone.

        Args:
            preds (torch.Tensor | None): Raw scores of any shape. Half precision is computed and returned in single
                precision, because it would tie.
            norm_min (torch.Tensor): Smallest validation score.
            norm_max (torch.Tensor): Largest validation score.
            threshold (torch.Tensor): Threshold; the middle of the range if it is NaN.

        Returns:
            torch.Tensor | None: Scores in [0, 1]; the raw scores if minimum and maximum aren't finite.
        """
        if preds is None:
            return None
        preds = preds.to(torch.promote_types(preds.dtype, torch.float32))
        low, high, threshold = (value.to(preds.dtype) for value in (norm_min, norm_max, threshold))
        threshold = torch.where(threshold.isnan(), low / 2 + high / 2, threshold)
        # Halves and eighths, because the difference of two huge scores would overflow.
        scale = torch.maximum(high, threshold) / 8 - torch.minimum(low, threshold) / 8
        finite = scale.isfinite()
        scale = torch.where(finite & (scale > 0), scale, torch.ones_like(scale))
        distance = (preds / 2 - threshold / 2) / scale
        tail = 0.5 / (1 + distance.abs())
        return torch.where(finite, torch.where(distance < 0, tail, 1 - tail), preds)


def _gathered(metric: CatMetric) -> list[float]:
    """Return the sorted values of all devices, and begin anew."""
    if not metric.update_called:
        return []
    # The metric returns a list where there are no values, and a single one without a dimension.
    values = torch.as_tensor(metric.compute()).flatten().sort().values.tolist()
    metric.reset()
    return values


def fewest_scores(false_alarm_rate: float) -> int:
    """Return how many good scores a rate of false alarms needs at least."""
    return math.ceil(round(1 / false_alarm_rate, 9)) - 1


def conformal_rank(count: int, false_alarm_rate: float) -> int:
    """Return which smallest of the good scores is the threshold.

    Args:
        count (int): Number of good scores.
        false_alarm_rate (float): Rate of false alarms asked for.

    Returns:
        int: Rank of the threshold among the sorted scores, counted from 1.

    Raises:
        ValueError: If there are fewer scores than the rate needs.
    """
    rank = math.ceil(round((count + 1) * (1 - false_alarm_rate), 9))  # 100 x 0.99 may be a little above 99
    if rank > count:
        msg = (
            f"false_alarm_rate={false_alarm_rate} needs at least {fewest_scores(false_alarm_rate)} good validation "
            f"images, got {count}; raise the data module's val_split_ratio, or the rate."
        )
        raise ValueError(msg)
    return rank
