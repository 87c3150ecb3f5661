# SPDX-License-Identifier: Apache-2.0

"""Mean and variance over more positions than fit into memory."""

import torch


def moments(values: torch.Tensor) -> torch.Tensor:
    """Return count, sum and sum of squares of each channel; those of several batches add up.

    Args:
        values (torch.Tensor): Values of shape ``(N, C)``; in double precision where there are many or their mean is far
            from 0, because the variance is a difference of large sums.

    Returns:
        torch.Tensor: Shape ``(3, C)``, of the values' type.
    """
    return torch.stack([torch.ones_like(values), values, values.square()]).sum(dim=1)


def mean_and_variance(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the sums of :func:`moments` say.

    Args:
        sums (torch.Tensor): Shape ``(3, C)``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Mean and variance (of the values, not of a population that they are drawn
            from), each of shape ``(C,)``; NaN if there were no values.

    Example:
        >>> mean_and_variance(moments(torch.tensor([[1.0], [2.0]])) + moments(torch.tensor([[6.0]])))
        (tensor([3.]), tensor([4.6667]))
    """
    count, total, squares = sums
    mean = total / count
    return mean, squares / count - mean.square()
