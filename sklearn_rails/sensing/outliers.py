"""Outlier detectors with the interface of scikit-learn or PyOD as threat detectors."""

from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import OutlierMixin, clone

from .._validation import as_array
from .base import Detector
from .samples import CleanSamples, Query

# Scores of a sample in two batches may differ by this share before they count as different.
BATCH_TOLERANCE = 1e-4


class OutlierDetector(Detector):
    """The scores of an outlier detector: one clone, fitted to the features, in each layer.

    It cannot leave a sample out, so the clones are fitted to the samples that do not calibrate.

    Parameters
    ----------
    estimator : estimator
        With ``score_samples`` or, if it is an ``OutlierMixin``, ``decision_function``, lower for
        more abnormal samples. Or a detector of PyOD, whose ``decision_function`` is higher.
    seed : int
        Its ``random_state``, if that is None.

    Attributes
    ----------
    estimators_ : dict of str to estimator
        The fitted clone of each layer.

    Raises
    ------
    TypeError
        If it is no outlier detector that can score new samples.
    ValueError
        In :meth:`fit`, if the score of a sample depends on the others of its batch.
    """

    leaves_one_out: ClassVar[bool] = False

    def __init__(self, estimator: Any, seed: int) -> None:
        if isinstance(estimator, type):
            name = estimator.__name__
            raise TypeError(f"method must hold an estimator, got the class {name}; pass {name}().")
        self._function, self._sign = _find_scores(estimator)
        self.estimator = clone(estimator)
        self._seed = seed

    def fit(self, clean: CleanSamples) -> Self:
        """Fit a clone to the features of the samples that do not calibrate."""
        self.estimators_ = {}
        for layer in clean.neighbors:
            features = _to_array(clean.features_of(layer, clean.training))
            estimator = clone(self.estimator)
            if estimator.get_params(deep=False).get("random_state", self._seed) is None:
                estimator.set_params(random_state=self._seed)
            self.estimators_[layer] = estimator.fit(features)
            self._check_batch_independence(layer, features[:1])
        return self

    def score(self, query: Query) -> NDArray[np.float64]:
        """Score samples: an ndarray of shape (n, n_layers), float64."""
        columns = [
            self._sign * self._scores(layer, _to_array(features))
            for layer, features in query.features.items()
        ]
        return np.stack(columns, axis=1)

    def _scores(self, layer: str, features: NDArray[Any]) -> NDArray[np.float64]:
        found = as_array(getattr(self.estimators_[layer], self._function)(features), "method")
        if found.dtype.kind not in "biuf":
            raise ValueError(
                f"method: {self._function} of {self.estimator!r} must return numbers, got "
                f"{found.dtype}."
            )
        scores: NDArray[np.float64] = found.astype(np.float64)
        if scores.shape != (len(features),):
            raise ValueError(
                f"method: {self._function} of {self.estimator!r} must return a number for each of "
                f"{len(features)} samples, got shape {scores.shape}."
            )
        return scores

    def _check_batch_independence(self, layer: str, sample: NDArray[Any]) -> None:
        """Check that the score of a sample is the same among a hundred copies of it."""
        alone, among = (self._scores(layer, sample.repeat(n, axis=0))[0] for n in (1, 100))
        if not np.isclose(alone, among, rtol=BATCH_TOLERANCE, atol=0, equal_nan=True):
            raise ValueError(
                f"method: {self.estimator!r} gives a sample another score in another batch "
                f"({alone:.6g} alone, {among:.6g} among copies of it), so the samples of a call "
                "would decide on one another. Use another outlier detector."
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.estimator!r})"


def _to_array(features: torch.Tensor) -> NDArray[Any]:
    return features.cpu().numpy()


def _find_scores(estimator: Any) -> tuple[str, int]:
    """Return the name of the method that scores samples, and the sign that makes it a threat."""
    if hasattr(estimator, "fit"):
        if hasattr(estimator, "score_samples"):
            return "score_samples", -1
        if hasattr(estimator, "decision_function"):
            if isinstance(estimator, OutlierMixin):
                return "decision_function", -1
            if hasattr(estimator, "contamination"):  # as all detectors of PyOD have it
                return "decision_function", 1
        if getattr(estimator, "novelty", None) is False:
            raise TypeError(
                f"method: {estimator!r} cannot score new samples; set its parameter novelty=True."
            )
    raise TypeError(
        f"method: {estimator!r} is not an outlier detector. It needs fit, and score_samples as in "
        "scikit-learn or decision_function and contamination as in PyOD."
    )
