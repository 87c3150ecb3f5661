# SPDX-License-Identifier: Apache-2.0

"""Losses of the two training phases."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class FlowLoss(nn.Module):
    r"""Negative log-likelihood of the features under the teacher, per feature and up to a constant.

    .. math::
        \mathcal{L} = \frac{1}{CHW} \left( \tfrac{1}{2} \lVert z \rVert^2 - \log \left| \det J \right| \right)
    """

    @staticmethod
    def forward(latents: list[torch.Tensor], log_dets: list[torch.Tensor]) -> torch.Tensor:
        """Average the loss over the batch and sum it over the scales.

        Args:
            latents (list[torch.Tensor]): Teacher's outputs, each of shape ``(B, C, H, W)``.
            log_dets (list[torch.Tensor]): Log-determinants of the Jacobians, each of shape ``(B,)``.

        Returns:
            torch.Tensor: Scalar.
        """
        losses = [
            (0.5 * latent.square().sum(dim=(1, 2, 3)) - log_det).mean() / latent[0].numel()
            for latent, log_det in zip(latents, log_dets, strict=True)
        ]
        return torch.stack(losses).sum()


class DistillationLoss(nn.Module):
    """Mean squared difference of the teacher's and the student's outputs, summed over the scales."""

    @staticmethod
    def forward(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> torch.Tensor:
        """Compare lists of maps of shape ``(B, C, H, W)``; the result is a scalar."""
        return torch.stack([F.mse_loss(s, t) for t, s in zip(teacher, student, strict=True)]).sum()


class AffinityLoss(nn.Module):
    r"""Teacher-student affinity loss: regions that are alike for the teacher shall be alike for the student.

    With :math:`A(z)_{ij}` the cosine similarity of the channel vectors of a map at positions :math:`i` and :math:`j`,

    .. math::
        \mathcal{L} = \operatorname{mean}_{ij} \left( A(z_t)_{ij} - A(z_s)_{ij} \right)^2 .

    The paper names the loss; the formula is this project's choice.

    Args:
        max_grid (int): Larger maps are average-pooled to this many rows and columns at most, as the matrix grows
            with the fourth power of them. Defaults to ``8``.
    """

    def __init__(self, max_grid: int = 8) -> None:
        super().__init__()
        self.max_grid = max_grid

    def affinity(self, maps: torch.Tensor) -> torch.Tensor:
        """Compute how alike the positions of a map are.

        Args:
            maps (torch.Tensor): Maps of shape ``(B, C, H, W)``.

        Returns:
            torch.Tensor: Cosine similarities of shape ``(B, N, N)``, with ``N`` positions after pooling, row by row.
        """
        height, width = maps.shape[-2:]
        if height > self.max_grid or width > self.max_grid:
            maps = F.adaptive_avg_pool2d(maps, (min(height, self.max_grid), min(width, self.max_grid)))
        vectors = F.normalize(maps.flatten(2), dim=1)
        return vectors.transpose(1, 2) @ vectors

    def forward(self, teacher: list[torch.Tensor], student: list[torch.Tensor]) -> torch.Tensor:
        """Compare lists of maps of shape ``(B, C, H, W)``; the scalar result is summed over the scales."""
        losses = [F.mse_loss(self.affinity(s), self.affinity(t)) for t, s in zip(teacher, student, strict=True)]
        return torch.stack(losses).sum()
