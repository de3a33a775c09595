"""The deep k-nearest-neighbours classifier."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from ._base import (
    NETWORK_CONSTRAINTS,
    NetworkClassifier,
    prepare_fit,
    restore_on_error,
    validate_rows,
)
from ._blocks import for_blocks, map_blocks
from ._compat import Interval, StrOptions, fit_context
from ._conformal import conformal_p_values, sample_rows
from ._documentation import document
from ._validation import read_samples, validate_labels
from .features.layer_choice import LayerScores, score_layers
from .neighbors import ClassNeighbors, ExactNeighbors
from .neighbors.certificate import certified_radii
from .neighbors.index import ALGORITHM_CONSTRAINT, N_JOBS_CONSTRAINT
from .neighbors.votes import neighbor_votes


def _certifies(dknn: "DkNNClassifier") -> bool:
    """Check that the prediction is the class of the exactly nearest sample."""
    layers, algorithm = getattr(dknn, "layers_", dknn.layers), dknn.algorithm
    if dknn.feature_extractor is None and layers in ("auto", None):
        layers = "input"
    names = [layers] if isinstance(layers, str) else layers
    if (
        dknn.n_neighbors == 1
        and isinstance(names, list | tuple)
        and [*map(str, names)] == ["input"]
        and (
            algorithm.storage != "float16"
            if isinstance(algorithm, ExactNeighbors)
            else str(algorithm) == "auto"
        )
    ):
        return True
    raise AttributeError(
        "certified_radius needs n_neighbors=1, layers='input' and algorithm='auto' or "
        "ExactNeighbors in full precision, got "
        f"n_neighbors={dknn.n_neighbors!r}, layers={dknn.layers!r} and algorithm={algorithm!r}."
    )


@document
class DkNNClassifier(NetworkClassifier):
    """Deep k-nearest neighbours: a vote of hidden layers, with its credibility.

    DkNN finds the k nearest training examples in every layer. The nonconformity of an input with a
    class is the number of them, over all layers, that are of another class. Compared with the
    nonconformities of held-out calibration samples, it yields a p-value for every class.

    Parameters
    ----------
    %(feature_extractor)s
    layers : "auto", str, sequence of str or None, default="auto"
        Layers that vote, as in ``module.named_modules()``.
        %(layers_auto)s
    n_neighbors : int, default=75
        Neighbours in each layer (k). Clipped where there are fewer training examples.
    calibration : float, "leave-one-out" or tuple (X_cal, y_cal), default=0.1
        Calibration samples, with whose nonconformities an input is compared.

        - a float: this share of the training samples, drawn at random whatever their class, and
          not among the neighbours. p-values are exactly valid (see Notes);
        - ``(X_cal, y_cal)``: samples of your own. p-values are exactly valid if new samples are
          drawn from the same distribution;
        - ``"leave-one-out"``: every training sample, compared with all others. No sample is lost
          for the neighbours, but p-values are only approximately valid.
    p_value : {"conformal", "empirical"}, default="conformal"
        ``"empirical"`` is the paper's share of calibration samples that conform no better. It may
        be 0, and is not valid: it is too small by up to 1 in ``n_calibration_``. ``"conformal"``
        counts the input itself too, ``(count + 1) / (n_calibration_ + 1)``, and is valid.
    algorithm : {"auto", "brute", "kd_tree", "ball_tree"} or estimator, default="auto"
        How neighbours are found: an exact matrix product on the device, scikit-learn's
        :class:`~sklearn.neighbors.NearestNeighbors`, or an estimator with ``kneighbors``, which is
        cloned for every layer.
    %(train_network)s
    %(input_shape)s
    %(device)s
    %(dtype)s
    %(batch_size)s

    n_jobs : int, default=None
        Threads for ``algorithm`` other than ``"auto"``.
    random_state : int, RandomState or None, default=None
        Decides which samples are held out, when ``calibration`` is a share.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The class labels.
    %(fitted)s
    %(layer_scores)s
    n_neighbors_ : int
        Neighbours in each layer.
    n_calibration_ : int
        Number of calibration samples.

    See Also
    --------
    RAILSClassifier : Breeds the neighbours toward the input before they vote.
    ThreatScorer : Turns a lack of credibility into an alarm.

    Notes
    -----
    A p-value is valid if that of the true class is alpha or less with a probability of at most
    alpha, for every alpha. This is so for a share and for samples of your own, for any number of
    samples and classes, in any order, and with ties, as long as calibration samples and new ones
    are exchangeable [2]_. The probability is over the training and calibration samples too: with n
    calibration samples, the rate of a single fitted estimator varies about alpha with a standard
    deviation of about sqrt(alpha (1 - alpha) / n).

    With ``calibration="leave-one-out"`` a training sample has one sample fewer to be neighbours
    than a new one. No theorem bounds the rate of such p-values (that of the jackknife+, which
    compares more, is at most 2 alpha [2]_). In the simulations of ``tests/test_rates.py``, from 10
    samples on, it was at most alpha.

    A share may hold out all samples of a small class. The class is then still in ``classes_``,
    but has no neighbours and is never predicted, and the nonconformity of its samples is the
    largest there is. To keep a class's last sample from being held out, as stratified splits do,
    would cost the validity of the p-values. Use ``"leave-one-out"`` where classes are that small.

    References
    ----------
    .. [1] N. Papernot, P. McDaniel, "Deep k-Nearest Neighbors: Towards Confident, Interpretable
       and Robust Deep Learning", 2018, arXiv:1803.04765, Algorithm 1.
    .. [2] R. F. Barber, E. J. Candes, A. Ramdas, R. J. Tibshirani, "Predictive Inference with the
       Jackknife+", The Annals of Statistics 49, 2021.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import DkNNClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> dknn = DkNNClassifier(n_neighbors=10, random_state=0)
    >>> _ = dknn.fit(X[:1000], y[:1000])
    >>> dknn.score(X[1000:], y[1000:]) > 0.9
    True
    >>> dknn.credibility(X[:3]).shape
    (3,)
    """

    _parameter_constraints = {
        "feature_extractor": "no_validation",
        **NETWORK_CONSTRAINTS,
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "calibration": [
            Interval(Real, 0, 1, closed="neither"),
            StrOptions({"leave-one-out"}),
            tuple,
            list,
        ],
        "p_value": [StrOptions({"conformal", "empirical"})],
        "algorithm": ALGORITHM_CONSTRAINT,
        "train_network": ["boolean"],
        "n_jobs": N_JOBS_CONSTRAINT,
        "random_state": ["random_state"],
    }

    layer_scores_: LayerScores | None
    _training_data: tuple[Any, NDArray[np.intp]] | None

    def __init__(
        self,
        feature_extractor: object = None,
        *,
        layers: str | Sequence[str] | None = "auto",
        n_neighbors: int = 75,
        calibration: float | str | tuple[Any, Any] = 0.1,
        p_value: str = "conformal",
        algorithm: object = "auto",
        train_network: bool = False,
        input_shape: tuple[int, ...] | None = None,
        device: str | torch.device = "auto",
        dtype: str = "float32",
        batch_size: int | str = "auto",
        n_jobs: int | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.feature_extractor = feature_extractor
        self.layers = layers
        self.n_neighbors = n_neighbors
        self.calibration = calibration
        self.p_value = p_value
        self.algorithm = algorithm
        self.train_network = train_network
        self.input_shape = input_shape
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state

    @restore_on_error
    @fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: ArrayLike | torch.Tensor, y: ArrayLike | torch.Tensor | None = None) -> Self:
        """Index the training data's features and calibrate.

        Parameters
        ----------
        %(X_train)s
        y : array-like of shape (n,)
            Their classes. None takes those of a data set of pairs.

        Returns
        -------
        DkNNClassifier
            The estimator itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or the data is invalid, the network does not fit the data, a layer or
            the device does not exist, or no sample is left to calibrate with. The estimator is then
            as it was before.
        """
        X, y = read_samples(X, y)
        samples, labels = prepare_fit(
            self, X, y, network=self.feature_extractor, score=score_layers
        )
        self.classes_, labels = np.unique(labels, return_inverse=True)
        train, self_index = np.arange(len(labels)), None
        if isinstance(self.calibration, tuple | list):
            X_calibration, y_calibration = self._check_calibration(self.calibration)
        elif len(labels) < 2:
            raise ValueError(
                f"calibration={self.calibration!r} needs 2 training samples or more, got "
                "n_samples=1."
            )
        elif self.calibration == "leave-one-out":
            X_calibration, y_calibration, self_index = samples, labels, train
        else:
            held_out = self._hold_out(len(labels), float(self.calibration))
            X_calibration, y_calibration = samples[held_out], labels[held_out]
            train = np.setdiff1d(train, held_out)
        self._labels = labels[train]
        self._training_data = samples, labels
        n_others = len(train) if self_index is None else len(train) - 1
        self.n_neighbors_ = min(int(self.n_neighbors), n_others)
        one_class = np.zeros(len(train), dtype=np.int64)
        self._neighbors = {
            layer: ClassNeighbors("euclidean", self.algorithm, self.n_jobs).start(one_class, 1)
            for layer in self.layers_
        }

        def add(block: slice) -> None:
            for layer, features in self._features(samples[train[block]]).items():
                self._neighbors[layer].add(block, features)

        for_blocks(add, len(train), self._features.row_bytes, self._features.device)
        for neighbors in self._neighbors.values():
            neighbors.build()
        nonconformity = self._nonconformities(X_calibration, self_index)
        self._calibration = np.sort(nonconformity[np.arange(len(nonconformity)), y_calibration])
        self.n_calibration_ = len(self._calibration)
        self._features.learn_range(samples)
        return self

    def predict(self, X: ArrayLike | torch.Tensor) -> NDArray[Any]:
        """Predict the classes of highest p-value; ties go by votes, then by distance.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        ndarray of shape (n,)
            The classes.
        """
        fitted, proba = self._shares(X)
        return fitted.classes_[proba.argmax(axis=1)]

    def predict_proba(self, X: ArrayLike | torch.Tensor) -> NDArray[Any]:
        """Return the classes' shares of the neighbours, with distance as a tie-breaker.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            Votes, with less than half a vote for the distance, over their sum. p-values grow with
            the votes, so the order of the classes is that of the p-values, ties broken.
        """
        return self._shares(X)[1]

    def p_values(self, X: ArrayLike | torch.Tensor) -> NDArray[Any]:
        """Compute the p-value of each class.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            Share of the calibration samples that conform with their class no better than the input
            does with this one.
        """
        fitted, samples = self._validate(X)
        nonconformity = fitted._nonconformities(samples)
        return conformal_p_values(
            nonconformity, fitted._calibration, count_own=fitted.p_value == "conformal"
        )

    def credibility(self, X: ArrayLike | torch.Tensor) -> NDArray[Any]:
        """Return the largest p-value: how well the training data support the prediction.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        ndarray of shape (n,), float64
            Between 0 and 1.
        """
        return self.p_values(X).max(axis=1)

    def confidence(self, X: ArrayLike | torch.Tensor) -> NDArray[Any]:
        """Return 1 minus the second largest p-value: how unlikely all other classes are.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        ndarray of shape (n,), float64
            Between 0 and 1; 1 if there is only one class.
        """
        p_values = np.sort(self.p_values(X), axis=1)
        return 1 - p_values[:, -2] if p_values.shape[1] > 1 else np.ones(len(p_values))

    @available_if(_certifies)
    def certified_radius(self, X: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
        """Compute a Euclidean radius within which the prediction cannot change.

        Only there with ``n_neighbors=1``, ``layers="input"`` and ``algorithm="auto"`` or
        :class:`~sklearn_rails.neighbors.ExactNeighbors` in full precision. The prediction is then
        the class of the nearest training sample, and an input must cross the hyperplane between one
        sample of the class and another's to change it.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        ndarray of shape (n,), float64
            In the units of X: every change of the input that changes its predicted label has at
            least this Euclidean norm. 0 where samples of two classes tie, infinite with one class.
            Rounding errors are subtracted.

        Notes
        -----
        With the distances d from the input, the radius is the minimum over the training samples
        t_j of other classes of the maximum, over the five nearest t_i of the predicted class, of
        (d_j^2 - d_i^2) / (2 ||t_i - t_j||). It takes one comparison with all training samples.

        Examples
        --------
        >>> from sklearn.datasets import load_digits
        >>> from sklearn_rails import DkNNClassifier
        >>> X, y = load_digits(return_X_y=True)
        >>> dknn = DkNNClassifier(n_neighbors=1, layers="input", random_state=0)
        >>> _ = dknn.fit(X[:1000], y[:1000])
        >>> dknn.certified_radius(X[1000:1003]).round(1)
        array([10.7, 12.7, 12.2])
        """
        fitted, samples = self._validate(X)
        return fitted._certify(samples)

    def training_data(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the samples that the classifier was fitted on, and their classes.

        Returns
        -------
        X : ndarray of shape (n, *input_shape)
            The samples, those for the calibration included. Not a copy: do not change them.
        y : ndarray of shape (n,)
            Their classes.

        Raises
        ------
        ValueError
            If the classifier was loaded: a pickle holds the features, but not the samples.
        """
        fitted = self._with({})  # read once
        check_is_fitted(fitted)
        if fitted._training_data is None:
            raise ValueError(
                "A loaded DkNNClassifier has the features of its training samples, but not the "
                "samples themselves: fit it again."
            )
        samples, labels = fitted._training_data
        samples = samples.cpu().numpy() if isinstance(samples, torch.Tensor) else samples
        return samples.reshape(len(samples), *fitted.input_shape_), fitted.classes_[labels]

    def __getstate__(self) -> dict[str, Any]:
        # Predictions need the features alone, and a file is smaller without the samples.
        state = super().__getstate__()
        return state | ({"_training_data": None} if "_training_data" in state else {})

    def _shares(self, X: ArrayLike | torch.Tensor) -> tuple[Self, NDArray[np.float64]]:
        """Return the estimator as it was fitted, and the classes' shares of the neighbours."""
        fitted, samples = self._validate(X)
        votes, tie_break = fitted._vote(samples)
        scores = votes + tie_break / 2
        return fitted, scores / scores.sum(axis=1, keepdims=True)

    def _vote(self, X: Any, self_index: NDArray[Any] | None = None) -> list[NDArray[Any]]:
        """Count the neighbours of each class, and measure how close the nearest of them is.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        self_index : ndarray of shape (n,), default=None
            Each sample's index among the training samples, if it is one of them.

        Returns
        -------
        votes, tie_break : ndarray of shape (n, n_classes), float64
            Closeness is in [0, 1): 0 where a class is not among the neighbours.
        """

        def vote(block: slice) -> tuple[NDArray[Any], NDArray[Any]]:
            return neighbor_votes(
                self._features(X[block]),
                self._neighbors,
                self._labels,
                n_neighbors=self.n_neighbors_,
                n_classes=len(self.classes_),
                self_index=None if self_index is None else self_index[block],
            )

        return map_blocks(vote, len(X), self._features.row_bytes, self._features.device)

    def _certify(self, X: Any) -> NDArray[np.float64]:
        ((layer, neighbors),) = self._neighbors.items()
        labels = torch.from_numpy(self._labels).to(self._features.device)
        stored_labels = labels[neighbors.index.to(labels.device)]

        def certify(block: slice) -> tuple[NDArray[np.float64]]:
            queries = self._features(X[block])[layer]
            _, nearest = neighbors.kneighbors(queries, 1)
            predicted = labels[nearest[:, 0, 0]]
            return (certified_radii(queries, neighbors.store, stored_labels, predicted),)

        # Squares of distances, and masks, ranks and bounds of them, in double precision.
        row_bytes = self._features.row_bytes + 6 * 8 * len(stored_labels)
        return map_blocks(certify, len(X), row_bytes, self._features.device)[0]

    def _nonconformities(self, X: Any, self_index: NDArray[Any] | None = None) -> NDArray[Any]:
        votes, _ = self._vote(X, self_index)
        return len(self.layers_) * self.n_neighbors_ - votes

    def _hold_out(self, n_samples: int, share: float) -> NDArray[np.int64]:
        """Draw the calibration samples whatever their class, so that new ones are like them."""
        n_held_out = round(share * n_samples)
        n_held_out = min(max(1, n_held_out), n_samples - 1)
        return sample_rows(n_samples, n_held_out, check_random_state(self.random_state))

    def _check_calibration(self, pair: Sequence[Any]) -> tuple[Any, NDArray[np.int64]]:
        if len(pair) != 2:
            raise ValueError(f"calibration must be a pair (X_cal, y_cal), got {len(pair)} items.")
        X, y = pair
        try:
            X = validate_rows(self, X)
            y = validate_labels(y, len(X), "y_cal")
        except (TypeError, ValueError) as error:
            raise ValueError(f"calibration=(X_cal, y_cal): {error}") from error
        # A dict, since numpy would take the label "1" for the class 1.
        places = {label: place for place, label in enumerate(self.classes_.tolist())}
        unknown = sorted({str(label) for label in y.tolist() if label not in places})
        if unknown:
            raise ValueError(
                f"calibration=(X_cal, y_cal): y_cal has classes that y has not: {unknown}."
            )
        return X, np.array([places[label] for label in y.tolist()])
