"""Accuracy that is left under attack."""

import atexit
import copy
import functools
import os
import shutil
import tempfile
from pathlib import Path

import joblib
import numpy as np
from sklearn.metrics import accuracy_score
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length, column_or_1d
from sklearn.utils.validation import check_is_fitted

from ..features import TorchFeatureExtractor
from ..features.frozen import as_module, freeze


def robust_accuracy_score(y_true, *y_attacked, sample_weight=None):
    """Share of the rows that are right under every one of some attacks.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        The true classes.
    *y_attacked : array-like of shape (n,)
        What is predicted for the rows under each attack; at least one. The predictions for the
        clean rows may be among them: an attacker is free to do nothing.
    sample_weight : array-like of shape (n,), default=None
        Weights of the rows.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    ValueError
        If there is no attack, or the numbers of rows differ.

    Examples
    --------
    >>> from sklearn_rails.metrics import robust_accuracy_score
    >>> robust_accuracy_score([0, 1, 1, 2], [0, 1, 0, 2], [0, 2, 1, 2])
    0.5
    """
    if not y_attacked:
        raise ValueError("robust_accuracy_score needs the predictions under one attack or more.")
    y_true = column_or_1d(y_true)
    y_attacked = [column_or_1d(y) for y in y_attacked]
    check_consistent_length(y_true, *y_attacked, sample_weight)
    stands = np.all([y == y_true for y in y_attacked], axis=0)
    return float(accuracy_score(np.ones_like(stands), stands, sample_weight=sample_weight))


def make_robust_scorer(attack):
    """Make a scorer for model selection: accuracy under an attack on the wrapped network.

    The scorer attacks the network inside an estimator on the rows it is asked to score, and gives
    the estimator's accuracy on the attacked rows. The rows depend on the network and the split
    alone, so they are made once for each split and shared by all candidates of a search, those in
    other processes included. This is a *transfer* attack: it knows nothing of the defence.

    Parameters
    ----------
    attack : callable
        ``attack(network, X, y)`` gives attacked copies of ``X``, an array of shape
        (n, *input_shape), for a ``torch.nn.Module`` in eval mode and the classes ``y`` as they are
        given to the search. It must be a function of these alone. With ``n_jobs`` it must pickle.

    Returns
    -------
    callable
        ``scorer(estimator, X, y)``, for fitted estimators of this package and pipelines that end
        in one. In a pipeline the rows are attacked behind the transformers that stand before it,
        where the network sees them.

    See Also
    --------
    robust_accuracy_score : The same from predictions.

    Notes
    -----
    Attacked rows are kept in a temporary folder until the process ends. Two processes that come to
    the same split at the same moment both attack it.

    Examples
    --------
    >>> from functools import partial
    >>> import torch
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklearn_rails import DkNNClassifier
    >>> from sklearn_rails.datasets import load_digit_images
    >>> from sklearn_rails.demo import pgd
    >>> from sklearn_rails.metrics import make_robust_scorer
    >>> digits = load_digit_images()
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> search = GridSearchCV(
    ...     DkNNClassifier(network, layers="input", random_state=0),
    ...     {"n_neighbors": [5, 20]},
    ...     scoring={"clean": "accuracy", "robust": make_robust_scorer(partial(pgd, max_iter=5))},
    ...     refit="robust",
    ...     cv=2,
    ... ).fit(digits.X_train[:300], digits.y_train[:300])
    >>> sorted(key for key in search.cv_results_ if key.startswith("mean_test"))
    ['mean_test_clean', 'mean_test_robust']
    """
    return _RobustScorer(attack)


class _RobustScorer:
    def __init__(self, attack):
        if not callable(attack):
            raise TypeError(f"attack must be callable, got {type(attack).__name__}.")
        self._attack = attack
        # The name goes with a pickle: worker processes find the rows in the same place.
        self._folder = tempfile.mkdtemp(dir=_folder())

    def __setstate__(self, state):
        vars(self).update(state)
        # The process that made the folder may have ended, as when a saved search is loaded.
        if not Path(self._folder).is_dir():
            self._folder = tempfile.mkdtemp(dir=_folder())

    def __repr__(self):
        return f"make_robust_scorer({self._attack!r})"

    def __call__(self, estimator, X, y):
        if isinstance(estimator, Pipeline):
            check_is_fitted(estimator)
            if len(estimator) > 1:
                X = estimator[:-1].transform(X)
            estimator = estimator[-1]
        network = _find_network(estimator)
        X = np.asarray(X, dtype=np.float32).reshape(len(X), *estimator.input_shape_)
        y = column_or_1d(y)
        return robust_accuracy_score(y, estimator.predict(self._attacked(network, X, y)))

    def _attacked(self, network, X, y):
        path = Path(self._folder) / f"{joblib.hash((freeze(network), X, y))}.npy"
        if path.is_file():
            return np.load(path)
        # A copy: the attack's gradients and the mode it runs in are no business of the network.
        attacked = np.asarray(self._attack(copy.deepcopy(network).eval(), X.copy(), y))
        if attacked.shape != X.shape:
            raise ValueError(
                f"attack must give rows of shape {X.shape}, as it got them, but it gave "
                f"{attacked.shape}."
            )
        # Under another name first: a reader finds all of a file or none of it.
        descriptor, partial = tempfile.mkstemp(dir=self._folder)
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, attacked)
        os.replace(partial, path)
        return attacked


@functools.cache
def _folder():
    folder = tempfile.mkdtemp(prefix="sklearn_rails_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _find_network(estimator):
    network = getattr(estimator, "feature_extractor", None)
    if isinstance(network, TorchFeatureExtractor):
        network = network.module
    if network is None:
        raise ValueError(
            f"{type(estimator).__name__} has no network to attack: give it a feature_extractor."
        )
    check_is_fitted(estimator)
    return as_module(network, "feature_extractor")
