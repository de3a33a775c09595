"""Accuracy under attack."""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from joblib.externals.loky.backend.resource_tracker import ResourceTracker
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, is_classifier
from sklearn.metrics import accuracy_score
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted

from .._base import validate_rows
from .._extractor import TorchFeatureExtractor
from .._validation import as_array, check_same_length, naming, validate_weights
from ..features.frozen import as_module, freeze
from ._arrays import as_numbers, check_labels

Attack = Callable[[torch.nn.Module, NDArray[Any], NDArray[Any]], ArrayLike | torch.Tensor]


def robust_accuracy_score(
    y_true: ArrayLike | torch.Tensor,
    *y_attacked: ArrayLike | torch.Tensor,
    sample_weight: ArrayLike | torch.Tensor | None = None,
) -> float:
    """Compute the share of samples that are classified correctly under every attack.

    Parameters
    ----------
    y_true : array-like of shape (n,), or torch.Tensor
        The true labels: strings, or numbers.
    *y_attacked : array-like of shape (n,), or torch.Tensor
        The labels predicted under each attack, of the kind of ``y_true``; at least one array. Pass
        the predictions for the clean samples as well: an attacker may leave a sample unchanged.
    sample_weight : array-like of shape (n,), or torch.Tensor, default=None
        Weights of the samples, 0 or more.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    ValueError
        If there is no attack, the numbers of samples differ, labels are missing, NaN, or strings
        in one array and numbers in another, or a weight is negative or not finite.

    Examples
    --------
    >>> from sklearn_rails.metrics import robust_accuracy_score
    >>> robust_accuracy_score([0, 1, 1, 2], [0, 1, 0, 2], [0, 2, 1, 2])
    0.5
    """
    if not y_attacked:
        raise ValueError("robust_accuracy_score needs the predictions under one attack or more.")
    labels = check_labels(y_true, "y_true")
    predicted = [check_labels(y, f"y_attacked[{i}]") for i, y in enumerate(y_attacked)]
    weights = None
    if sample_weight is not None:
        weights = validate_weights(sample_weight, len(labels))
    check_same_length(y_true=labels, **{f"y_attacked[{i}]": y for i, y in enumerate(predicted)})
    if len(labels) == 0:
        raise ValueError("y_true has no samples.")
    for i, y in enumerate(predicted):
        if (y.dtype.kind == "U") != (labels.dtype.kind == "U"):
            raise ValueError(
                f"y_attacked[{i}] has labels of dtype {y.dtype}, but y_true of {labels.dtype}: "
                "all must be strings, or all numbers."
            )
    is_robust = np.all([y == labels for y in predicted], axis=0)
    return float(accuracy_score(np.ones_like(is_robust), is_robust, sample_weight=weights))


def make_robust_scorer(
    attack: Attack,
) -> Callable[[BaseEstimator, ArrayLike, ArrayLike], float]:
    """Make a scorer for model selection: accuracy under an attack on the wrapped network.

    The scorer attacks the network of an estimator on the samples to be scored, and returns the
    estimator's accuracy on the attacked samples. These depend only on the network and the split:
    they are computed once for each split and shared by all candidates of a search, in other
    processes too. This is a *transfer* attack: it does not take the defence into account.

    Parameters
    ----------
    attack : callable
        ``attack(network, X, y)`` returns attacked copies of ``X``, as an array or a
        ``torch.Tensor``.

        - ``network``: a copy of the ``torch.nn.Module``, in eval mode and in the estimator's
          dtype.
        - ``X``: ndarray of shape (n, *input_shape) in the estimator's dtype; integers where the
          network takes integers.
        - ``y``: ndarray of shape (n,), int64, as torch's losses expect it: numeric labels
          unchanged, strings as their positions in the sorted classes.

        All three are copies, which the attack may change. Its result must depend on them alone.
        With ``n_jobs`` it must pickle.

    Returns
    -------
    callable
        ``scorer(estimator, X, y)``, for fitted classifiers of this package and pipelines that end
        in one. In a pipeline the attack is applied after the transformers, to the input of the
        network. The scorer raises a ValueError if the attacked samples are not finite numbers of
        the shape of ``X``.

    See Also
    --------
    robust_accuracy_score : The same from predictions.

    Notes
    -----
    Attacked samples are kept in a temporary folder, which is removed when the process that created
    it ends, or a moment later if a signal ends it. Two processes that reach the same split at the
    same time both attack it.

    Examples
    --------
    >>> from functools import partial
    >>> import torch
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklearn_rails import DkNNClassifier
    >>> from sklearn_rails.attacks import pgd
    >>> from sklearn_rails.datasets import load_digit_images
    >>> from sklearn_rails.metrics import make_robust_scorer
    >>> digits = load_digit_images()
    >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    >>> search = GridSearchCV(
    ...     DkNNClassifier(network, layers="input", random_state=0),
    ...     {"n_neighbors": [5, 20]},
    ...     scoring={
    ...         "clean": "accuracy",
    ...         "robust": make_robust_scorer(partial(pgd, eps=0.2)),
    ...     },
    ...     refit="robust",
    ...     cv=2,
    ... ).fit(digits.X_train[:300], digits.y_train[:300])
    >>> sorted(key for key in search.cv_results_ if key.startswith("mean_test"))
    ['mean_test_clean', 'mean_test_robust']
    """
    return _RobustScorer(attack)


class _RobustScorer:
    def __init__(self, attack: Attack) -> None:
        if not callable(attack):
            raise TypeError(f"attack must be callable, got {type(attack).__name__}.")
        self._attack = attack
        self._path: str | None = None

    @property
    def _folder(self) -> str:
        """The folder of attacked samples, made when it is first needed."""
        # The process that made the folder may have ended, for example if a saved search is loaded.
        if self._path is None or not os.path.isdir(self._path):
            self._path = _make_folder()
        return self._path

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes find the samples in the same folder.
        return {"_attack": self._attack, "_path": self._folder}

    def __repr__(self) -> str:
        return f"make_robust_scorer({self._attack!r})"

    def __call__(self, estimator: Any, X: ArrayLike, y: ArrayLike) -> float:
        if isinstance(estimator, Pipeline):
            check_is_fitted(estimator)
            if len(estimator) > 1:
                X = estimator[:-1].transform(X)
            estimator = estimator[-1]
        network = _find_network(estimator)
        # A tensor if X is on a GPU.
        samples = as_array(validate_rows(estimator, X), "X")
        samples = samples.reshape(len(samples), *estimator.input_shape_)
        labels = check_labels(y, "y")
        check_same_length(X=samples, y=labels)
        attacked = self._attacked(
            network, samples, _encode(labels, estimator.classes_), estimator.feature_map_.dtype
        )
        with naming("attack"):
            predicted = estimator.predict(attacked)
        with naming("y"):
            return robust_accuracy_score(labels, predicted)

    def _attacked(
        self, network: torch.nn.Module, X: NDArray[Any], y: NDArray[np.int64], dtype: torch.dtype
    ) -> NDArray[Any]:
        """Return attacked copies of X, from the folder if the same samples were attacked before."""
        frozen = freeze(network)
        path = Path(self._folder) / f"{joblib.hash((frozen, X, y))}.npy"
        if path.is_file():
            kept: NDArray[Any] = np.load(path)
            return kept
        device = next((p.device for p in network.parameters()), None)
        with torch.inference_mode(False), torch.enable_grad():
            # A copy: the attack may change the network, its gradients and its mode.
            twin = pickle.loads(pickle.dumps(frozen)).module.to(device=device, dtype=dtype)
            returned = self._attack(twin.eval(), X.copy(), y.copy())
        attacked = _check_attacked(returned, X)
        # Written under another name first, so that no other process reads half a file.
        descriptor, partial = tempfile.mkstemp(dir=self._folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, attacked)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        return attacked


# Its process outlives this one and removes the folders that are still registered then. joblib's own
# tracker would wait for idle workers, which may take minutes to end.
_TRACKER = ResourceTracker()


def _make_folder() -> str:
    """Make a temporary folder that is removed when this process ends, however it ends."""
    # Started before the folder is made: a signal during the start would leave the folder behind.
    _TRACKER.ensure_running()
    folder = tempfile.mkdtemp(prefix="sklearn_rails_")
    _TRACKER.register(folder, "folder")
    atexit.register(_remove_folder, folder, os.getpid())
    return folder


def _remove_folder(folder: str, owner: int) -> None:
    # A forked process inherits this function, but not the folder.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        _TRACKER.unregister(folder, "folder")


def _find_network(estimator: Any) -> torch.nn.Module:
    network = getattr(estimator, "feature_extractor", None)
    if getattr(estimator, "train_network", False):
        network = getattr(estimator, "network_", network)
    if isinstance(network, TorchFeatureExtractor):
        network = network.module
    if network is None:
        raise ValueError(
            f"{type(estimator).__name__} has no network to attack: give it a feature_extractor."
        )
    if not is_classifier(estimator):
        raise TypeError(f"estimator must be a classifier, got {type(estimator).__name__}.")
    check_is_fitted(estimator)
    module: torch.nn.Module = as_module(network, "feature_extractor")
    return module


def _encode(y: NDArray[Any], classes: NDArray[Any]) -> NDArray[np.int64]:
    """Convert labels to the integers that torch's losses expect."""
    if y.dtype.kind == "U":
        # The test samples may have classes that the training samples of this split lack.
        return np.searchsorted(np.union1d(np.asarray(classes).astype(str), y), y)
    return y.astype(np.int64)


def _check_attacked(attacked: ArrayLike | torch.Tensor, X: NDArray[Any]) -> NDArray[Any]:
    """Check what an attack returned, and convert it to the dtype of X."""
    numbers = as_numbers(attacked, "The result of attack")
    if numbers.shape != X.shape:
        raise ValueError(
            f"attack must return samples of shape {X.shape}, as it got them, but returned "
            f"{numbers.shape}."
        )
    with np.errstate(over="ignore", invalid="ignore"):
        converted = numbers.astype(X.dtype)
    if not (np.isfinite(numbers).all() and np.isfinite(converted).all()):
        raise ValueError(f"attack must return finite samples, also as {X.dtype}.")
    if X.dtype.kind in "iu" and not np.array_equal(converted, numbers):
        raise ValueError(f"attack must return whole numbers that fit into {X.dtype}.")
    return converted
