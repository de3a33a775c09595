"""Gradients with respect to the input of networks that may not have any."""

from collections.abc import Callable

import torch

from .device import is_out_of_memory
from .outputs import class_logits


class NotDifferentiableError(Exception):
    """A function of a network has no gradient; the message says why."""


def lead_of_others(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return by how much the largest logit of another class exceeds that of the labels.

    Its gradient does not vanish where the softmax is rounded to 1, as the cross-entropy's does.

    Parameters
    ----------
    logits : torch.Tensor of shape (n, n_classes) or (n, 1)
        A single one is that of the second of two classes.
    labels : torch.Tensor of shape (n,), int64

    Returns
    -------
    torch.Tensor of shape (n,)
    """
    logits = class_logits(logits)
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - own


def differentiate(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of the sum of a function's values.

    Parameters
    ----------
    function : callable
        Runs the network.
    x : torch.Tensor
        Point at which the gradient is computed.

    Returns
    -------
    torch.Tensor of the shape of x

    Raises
    ------
    NotDifferentiableError
        If there is none.
    """
    x = x.detach().requires_grad_()
    try:
        total = function(x).sum()
        gradient = None
        if total.requires_grad:
            (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
    except RuntimeError as error:  # such as operations with out=, or in place
        if is_out_of_memory(error):
            raise
        raise NotDifferentiableError(f"torch says: {error}") from error
    if gradient is None:
        raise NotDifferentiableError("its output is detached from its input.")
    return gradient
