"""A detector by how sure the network is of its prediction."""

from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..features.outputs import class_logits
from .base import Detector
from .samples import CleanSamples, Query, SoftQuery


class Confidence(Detector):
    """The log odds against the label that the network predicts (Hendrycks and Gimpel 2017).

    They order samples as the largest probability of the softmax does, and are not rounded where
    this is nearly 1.
    """

    uses_layers: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = True

    def fit(self, clean: CleanSamples) -> Self:
        """Return the detector itself: there is nothing to learn."""
        return self

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples: an ndarray of shape (n, 1), float64."""
        scores: NDArray[np.float64] = odds_against(query.outputs.cpu().double())[:, None].numpy()
        return scores

    def soft_threat(self, query: SoftQuery) -> torch.Tensor:
        """Compute the score itself, which can be differentiated."""
        assert query.outputs is not None  # since needs_outputs
        return odds_against(query.outputs)


def odds_against(outputs: torch.Tensor) -> torch.Tensor:
    """Return the log odds against the most probable class.

    Parameters
    ----------
    outputs : torch.Tensor of shape (n, n_outputs)
        Logits.

    Returns
    -------
    torch.Tensor of shape (n,)
    """
    logits = class_logits(outputs)
    first = logits.argmax(dim=1, keepdim=True)
    others = logits.scatter(1, first, -torch.inf)
    return torch.logsumexp(others, dim=1) - logits.gather(1, first)[:, 0]
