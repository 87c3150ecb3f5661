# SPDX-License-Identifier: Apache-2.0

"""Normalising-flow teacher (the paper's NFTN).

The paper states an invertible flow that models the density of normal features and responds strongly to anomalies.
Following AST (Rudolph et al., WACV 2023) we take a RealNVP with convolutional subnets and affine couplings.
"""

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import GLOWCouplingBlock, PermuteRandom
from torch import nn


class FlowTeacher(nn.Module):
    """Flow over the feature maps of one scale.

    Args:
        channels (int): Channels of the feature maps, at least 2.
        condition_channels (int): Channels of the condition, 0 for none.
        steps (int): Number of coupling blocks, at least 1.
        hidden_channels (int): Width of the coupling subnets.
        clamp (float): Soft clamp of the log-scale: one coupling scales a channel by at most ``exp(clamp)``.
            Defaults to ``2.0``.
    """

    def __init__(
        self,
        channels: int,
        condition_channels: int,
        steps: int,
        hidden_channels: int,
        clamp: float = 2.0,
    ) -> None:
        super().__init__()

        def subnet(in_channels: int, out_channels: int) -> nn.Sequential:
            last = nn.Conv2d(hidden_channels, out_channels, kernel_size=3, padding=1)
            # Zero output makes the untrained flow the identity (up to permutation): training starts stable.
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            return nn.Sequential(
                nn.Conv2d(in_channels, hidden_channels, kernel_size=3, padding=1),
                nn.ReLU(inplace=True),
                last,
            )

        # FrEIA only compares the spatial sizes given here with each other; the layers accept any grid.
        self.flow = SequenceINN(channels, 1, 1)
        condition = {"cond": 0, "cond_shape": (condition_channels, 1, 1)} if condition_channels else {}
        for _ in range(steps):
            self.flow.append(PermuteRandom)
            self.flow.append(GLOWCouplingBlock, **condition, subnet_constructor=subnet, clamp=clamp)

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map features to latent variables, or back.

        Args:
            x (torch.Tensor): Standardised features (latent variables if ``reverse``) of shape ``(B, C, H, W)``.
            condition (torch.Tensor | None): Condition of shape ``(B, condition_channels, H, W)``.
            reverse (bool): Run the inverse. Defaults to ``False``.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Result of the same shape as ``x``, and the log-determinant of the
                Jacobian, of shape ``(B,)``.
        """
        return self.flow(x, c=None if condition is None else [condition], rev=reverse)
