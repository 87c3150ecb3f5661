# SPDX-License-Identifier: Apache-2.0

"""Normalising-flow teacher (the paper's NFTN).

The paper states an invertible flow that models the density of normal features and responds strongly to anomalies.
Following AST (Rudolph et al., WACV 2023) we take a RealNVP with convolutional subnets and affine couplings.
"""

from collections.abc import Iterable, Sequence

import torch
from FrEIA.framework import SequenceINN
from FrEIA.modules import InvertibleModule
from torch import nn
from torch.nn import functional as F  # noqa: N812


class MaskedCoupling(InvertibleModule):
    r"""Affine coupling of channels, in the masked form of RealNVP (Dinh et al., ICLR 2017, equation 9).

    .. math::
        y = x \odot \exp(s) + t, \quad s, t = (1 - b) \odot \mathrm{subnet}(b \odot x \mid c), \quad
        \log \left| \det J \right| = \sum s

    With a mask nothing is split, joined or permuted: at inference, such copies cost more than the subnet. The subnet is
    a depthwise-separable convolution between two 1x1 convolutions.

    Args:
        dims_in (Sequence[tuple[int, ...]]): Shape of the input, ``(C, H, W)``; the layers accept any ``H`` and ``W``.
        dims_c (Sequence[tuple[int, ...]]): Shape of the condition, ``(C, H, W)`` likewise.
        keep (torch.Tensor): The mask :math:`b` of shape ``(C,)``: true for channels that stay as they are.
        hidden_channels (int): Width of the subnet.
        kernel_size (int): Rows and columns of the depthwise convolution, odd. Defaults to ``5``.
        clamp (float): Soft clamp of :math:`s`, by a softsign: a channel is scaled by less than ``exp(clamp)``.
            Defaults to ``2.0``.
    """

    def __init__(
        self,
        dims_in: Sequence[tuple[int, ...]],
        dims_c: Sequence[tuple[int, ...]],
        *,
        keep: torch.Tensor,
        hidden_channels: int,
        kernel_size: int = 5,
        clamp: float = 2.0,
    ) -> None:
        super().__init__(dims_in, dims_c)
        channels = dims_in[0][0]
        self.clamp = clamp
        self.register_buffer("keep", keep.float().view(-1, 1, 1))
        self.keep: torch.Tensor
        self.enter = nn.Conv2d(channels, hidden_channels, kernel_size=1)
        # Apart from `enter`, so that it runs once a batch in training and becomes a constant in an exported model.
        self.enter_condition = nn.Conv2d(dims_c[0][0], hidden_channels, kernel_size=1, bias=False)
        self.mix = nn.Conv2d(hidden_channels, hidden_channels, kernel_size, padding="same", groups=hidden_channels)
        self.log_scale = nn.Conv2d(hidden_channels, channels, kernel_size=1)
        self.shift = nn.Conv2d(hidden_channels, channels, kernel_size=1)
        # Zero output makes the untrained flow the identity: training starts stable.
        for parameter in (*self.log_scale.parameters(), *self.shift.parameters()):
            nn.init.zeros_(parameter)

    def forward(
        self,
        x_or_z: Iterable[torch.Tensor],
        c: Iterable[torch.Tensor],
        rev: bool = False,
        jac: bool = True,
    ) -> tuple[tuple[torch.Tensor], torch.Tensor]:
        """Apply the coupling or its inverse; arguments and results as FrEIA defines them."""
        (x,) = x_or_z
        (condition,) = c
        hidden = self.enter(x * self.keep) + self.enter_condition(condition)
        hidden = torch.relu(self.mix(torch.relu(hidden)))
        log_scale = (1 - self.keep) * self.clamp * F.softsign(self.log_scale(hidden))
        shift = (1 - self.keep) * self.shift(hidden)
        result = (x - shift) * torch.exp(-log_scale) if rev else x * torch.exp(log_scale) + shift
        log_det = log_scale.sum(dim=(1, 2, 3)) if jac else x.new_zeros(x.shape[0])
        return (result,), -log_det if rev else log_det

    def output_dims(self, input_dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the shapes of the output, which are those of the input."""
        return input_dims


class FlowTeacher(nn.Module):
    """Flow over the feature maps of one scale.

    Args:
        channels (int): Channels of the feature maps, at least 2.
        condition_channels (int): Channels of the condition.
        steps (int): Number of couplings, at least 1.
        hidden_channels (int): Width of the coupling subnets.
    """

    def __init__(self, channels: int, condition_channels: int, steps: int, hidden_channels: int) -> None:
        super().__init__()
        # FrEIA only compares the spatial sizes given here with each other; the layers accept any grid.
        self.flow = SequenceINN(channels, 1, 1)
        condition = {"cond": 0, "cond_shape": (condition_channels, 1, 1)}
        for step in range(steps):
            # A random half of the channels, then the other half.
            if step % 2 == 0:
                half = torch.randperm(channels) < channels // 2
            keep = ~half if step % 2 else half
            self.flow.append(MaskedCoupling, **condition, keep=keep, hidden_channels=hidden_channels)

    def forward(
        self,
        x: torch.Tensor,
        condition: torch.Tensor,
        reverse: bool = False,
        log_det: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map features to latent variables, or back.

        Args:
            x (torch.Tensor): Standardised features (latent variables if ``reverse``) of shape ``(B, C, H, W)``.
            condition (torch.Tensor): Condition of shape ``(1 or B, condition_channels, H, W)``.
            reverse (bool): Run the inverse. Defaults to ``False``.
            log_det (bool): Whether to compute the log-determinant. Defaults to ``True``.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Result of the same shape as ``x``, and the log-determinant of the
                Jacobian, of shape ``(B,)``; zeros if ``log_det`` is ``False``.
        """
        return self.flow(x, c=[condition], rev=reverse, jac=log_det)
