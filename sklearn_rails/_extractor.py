"""Named layers of a fitted network as features."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin

from ._base import (
    NETWORK_CONSTRAINTS,
    NetworkEstimator,
    as_fitted,
    prepare_fit,
    restore_on_error,
    validate_rows,
)
from ._blocks import ANSWERS_ADVICE
from ._compat import fit_context
from ._documentation import document
from .features.device import explain_out_of_memory


@document
class TorchFeatureExtractor(ClassNamePrefixFeaturesOutMixin, TransformerMixin, NetworkEstimator):
    """Layers of a fitted network as a transformer.

    ``transform`` runs the network as far as the last of the layers, in eval mode and without
    gradients, and gives their outputs flattened and side by side. The network is never changed,
    and :meth:`fit` learns nothing but the number of features.

    Parameters
    ----------
    module : torch.nn.Module, fitted skorch net or FrozenModule, default=None
        The network. None passes X through.
    layers : str or sequence of str, default=None
        Names of layers, as in ``module.named_modules()``. ``"input"`` and ``"output"`` stand for
        the network's own, and None for its output.
    %(input_shape)s
    %(device)s
    %(dtype)s
    %(batch_size)s

    Attributes
    ----------
    %(fitted)s

    See Also
    --------
    FrozenModule : A network as a parameter that hashes by its content.

    Notes
    -----
    The estimators of this package take the extractor, or the network itself, as their
    ``feature_extractor``. A torch tensor handed to ``transform`` gives a tensor on the device.

    Examples
    --------
    >>> import numpy as np
    >>> from torch import nn
    >>> from sklearn_rails import TorchFeatureExtractor
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> X = np.ones((5, 4), dtype=np.float32)
    >>> TorchFeatureExtractor(net, layers=["0", "2"]).fit_transform(X).shape
    (5, 5)
    """

    _parameter_constraints = {"module": "no_validation", **NETWORK_CONSTRAINTS}
    network_parameter = "module"

    def __init__(
        self,
        module: object = None,
        *,
        layers: str | Sequence[str] | None = None,
        input_shape: tuple[int, ...] | None = None,
        device: str | torch.device = "auto",
        dtype: str = "float32",
        batch_size: int | str = "auto",
    ) -> None:
        self.module = module
        self.layers = layers
        self.input_shape = input_shape
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size

    @restore_on_error
    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike | torch.Tensor, y: None = None) -> Self:
        """Check the network and its layers against the shape of X.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape)
            Inputs of the network.
        y : None
            Not used, present by convention.

        Returns
        -------
        TorchFeatureExtractor
            The estimator itself.

        Raises
        ------
        ValueError
            If a parameter is invalid, a layer is unknown, or X does not fit the network.
        """
        prepare_fit(self, X, network=self.module)
        self._n_features_out = self._features.n_features_out
        return self

    def transform(self, X: ArrayLike | torch.Tensor) -> np.ndarray | torch.Tensor:
        """Compute the layers' features.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs of the network.

        Returns
        -------
        ndarray of shape (n, n_features_out), or torch.Tensor if X is one
            The features, in the dtype of the estimator.

        Raises
        ------
        ValueError
            If X does not fit the network.
        """
        if not hasattr(self, "_features"):
            return type(self)(**self.get_params(deep=False)).fit(X).transform(X)
        fitted = as_fitted(self)
        rows = validate_rows(fitted, X)
        with explain_out_of_memory(ANSWERS_ADVICE):
            features = torch.cat(list(fitted.feature_map_(rows).values()), dim=1)
        return features if isinstance(X, torch.Tensor) else features.cpu().numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = []  # `dtype` decides
        return tags
