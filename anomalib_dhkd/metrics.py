# SPDX-License-Identifier: Apache-2.0

"""The paper's objective as a number: how far a network's response moves on anomalies."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F  # noqa: N812
from torchmetrics import Metric


class ResponseShift(Metric):
    r"""Mean squared deviation of a network's response on anomalies, in variances of its response on good images.

    The abstract asks of the teacher a large, of the student a small difference of the responses to a normal and an
    anomalous image. Real anomalies have no normal twin, so the good images' mean stands for it: with :math:`\mu_c` and
    :math:`\sigma_c^2` the mean and variance of channel :math:`c` over all positions of good images, :math:`E_a` the
    mean over the anomalous positions, and :math:`C` channels in all scales together,

    .. math::
        \frac{1}{C} \sum_c \frac{E_a[(z_c - \mu_c)^2]}{\sigma_c^2} ,

    which is 1 where anomalies change nothing. NaN unless there are good and anomalous positions.

    Args:
        channels (Sequence[int]): Number of channels of each scale.
    """

    full_state_update = False
    moments: torch.Tensor

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        # Count, sum and sum of squares, of good and anomalous positions.
        self.add_state("moments", torch.zeros(2, 3, sum(channels)), dist_reduce_fx="sum")

    def update(self, responses: list[torch.Tensor], labels: torch.Tensor, masks: torch.Tensor | None) -> None:
        """Add a batch.

        Args:
            responses (list[torch.Tensor]): Outputs of the network, of shape ``(B, C, h, w)`` a scale.
            labels (torch.Tensor): Whether images are anomalous, of shape ``(B,)``.
            masks (torch.Tensor | None): Anomalous pixels, of shape ``(B, H, W)``; without them every position of an
                anomalous image counts as anomalous.
        """
        good = ~labels.bool()[:, None, None]
        moments = []
        for response in responses:
            grid = response.shape[-2:]
            anomalous = ~good if masks is None else ~good & F.adaptive_max_pool2d(masks.float(), grid).bool()
            values = response.float().movedim(1, -1)
            chosen = [values[where.expand(-1, *grid)] for where in (good, anomalous)]
            moments.append(
                torch.stack([torch.stack([torch.ones_like(v), v, v.square()]).sum(dim=1) for v in chosen]),
            )
        self.moments += torch.cat(moments, dim=-1)

    def compute(self) -> torch.Tensor:
        """Return the shift, of shape ``()``."""
        (good, good_sum, good_squares), (count, total, squares) = self.moments
        mean = good_sum / good
        variance = good_squares / good - mean.square()
        deviation = squares / count - 2 * mean * total / count + mean.square()
        return (deviation / variance).mean()
