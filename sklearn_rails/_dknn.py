"""The deep k-nearest-neighbours classifier."""

from numbers import Integral, Real

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ._compat import HasMethods, Interval, StrOptions, fit_context
from ._validation import all_or_nothing, validate_fit_rows, validate_rows
from .features import NETWORK_CONSTRAINTS, SharesNetwork, feature_map, open_parameter
from .immune.conformity import conformal_p_values, neighbor_votes
from .immune.flocking import ClassNeighbors


class DkNNClassifier(ClassifierMixin, SharesNetwork):
    """Deep k-nearest neighbours: hidden layers vote, and say how credible their answer is.

    In every layer the k nearest training examples are found. The nonconformity of an input with a
    class is the number of them, over all layers, that are of another class; compared with the
    nonconformities of held-out calibration rows it gives a p-value for every class.

    Parameters
    ----------
    feature_extractor : None, torch.nn.Module, fitted skorch net, FrozenModule or \
            TorchFeatureExtractor, default=None
        The fitted network. None takes the input itself as the only layer.
    layers : str or sequence of str, default=None
        Layers that vote, as in ``module.named_modules()``. None takes the extractor's own layers,
        else the network's output.
    n_neighbors : int, default=75
        Neighbours in each layer (k). Clipped where there are fewer training examples.
    calibration : float, "leave-one-out" or tuple (X_cal, y_cal), default=0.1
        Rows whose nonconformity is the measure: a share of each class's training rows, which are
        then not among the neighbours (no class loses its last row); every training row against
        all others; or rows of your own.
    p_value : {"conformal", "empirical"}, default="conformal"
        ``"empirical"`` is the paper's share of calibration rows that conform no better;
        ``"conformal"`` counts the row itself too, (count + 1) / (n + 1), which makes it a valid
        p-value.
    algorithm : {"auto", "brute", "kd_tree", "ball_tree"} or estimator, default="auto"
        How neighbours are found: an exact matrix product on the device, scikit-learn's
        :class:`~sklearn.neighbors.NearestNeighbors`, or an estimator with ``kneighbors``, which is
        cloned for every layer.
    input_shape : tuple of int, default=None
        Shape of one input, such as ``(1, 28, 28)``, when X has two dimensions. None takes X's own
        shape.
    device : str, default="auto"
        ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or ``"mps"``; ``"auto"`` is CUDA where there is a
        GPU, else the CPU.
    dtype : {"float32", "float64"}, default="float32"
        Precision of the network and the features.
    batch_size : int or "auto", default="auto"
        Rows that go through the network together.
    n_jobs : int, default=None
        Threads for ``algorithm`` other than ``"auto"``.
    random_state : int, RandomState or None, default=None
        Decides which rows calibrate, when ``calibration`` is a share.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The class labels.
    n_features_in_ : int
        Number of values in one input.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the inputs, when X has them.
    input_shape_ : tuple of int
        Shape of one input.
    layers_ : tuple of str
        The layers.
    n_neighbors_ : int
        Neighbours in each layer.
    n_calibration_ : int
        Calibration rows.
    device_ : torch.device
        Where the computation runs.

    See Also
    --------
    RAILSClassifier : Breeds the neighbours toward the input before they vote.
    ThreatScorer : Turns a lack of credibility into an alarm.

    References
    ----------
    .. [1] N. Papernot, P. McDaniel, "Deep k-Nearest Neighbors: Towards Confident, Interpretable
       and Robust Deep Learning", 2018, arXiv:1803.04765, Algorithm 1.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import DkNNClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> dknn = DkNNClassifier(n_neighbors=10, random_state=0).fit(X[:1000], y[:1000])
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
        ],
        "p_value": [StrOptions({"conformal", "empirical"})],
        "algorithm": [
            StrOptions({"auto", "brute", "kd_tree", "ball_tree"}),
            HasMethods(["fit", "kneighbors"]),
        ],
        "n_jobs": [None, Integral],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        feature_extractor=None,
        *,
        layers=None,
        n_neighbors=75,
        calibration=0.1,
        p_value="conformal",
        algorithm="auto",
        input_shape=None,
        device="auto",
        dtype="float32",
        batch_size="auto",
        n_jobs=None,
        random_state=None,
    ):
        self.feature_extractor = feature_extractor
        self.layers = layers
        self.n_neighbors = n_neighbors
        self.calibration = calibration
        self.p_value = p_value
        self.algorithm = algorithm
        self.input_shape = input_shape
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state

    @all_or_nothing
    @fit_context(prefer_skip_nested_validation=False)
    def fit(self, X, y):
        """Index the training data's features and calibrate.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Training inputs, finite.
        y : array-like of shape (n,)
            Their classes.

        Returns
        -------
        DkNNClassifier
            The estimator itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or the data is invalid, the network does not fit the data, a layer or
            the device is not there, or no row is left to calibrate with. The estimator is then as
            it was before.
        """
        X, y = validate_fit_rows(self, X, y, input_shape=open_parameter(self, "input_shape"))
        self.classes_, y = np.unique(y, return_inverse=True)
        self._features = feature_map(self, self.feature_extractor)
        self._features.probe(X)
        self.layers_ = self._features.layers

        rows, calibration_rows = np.arange(len(y)), np.arange(len(y))
        X_calibration, y_calibration = X, y
        if isinstance(self.calibration, tuple):
            X_calibration, y_calibration = self._check_calibration()
        elif self.calibration != "leave-one-out":
            rows, calibration_rows = split_by_class(y, self.calibration, self.random_state)
            X_calibration, y_calibration = X[calibration_rows], y[calibration_rows]
        left_out = self.calibration == "leave-one-out"
        if len(rows) - left_out < 1:
            raise ValueError(
                f"calibration={self.calibration!r} needs 2 training rows or more, got n_samples=1."
            )
        self._labels = y[rows]
        self.n_neighbors_ = min(self.n_neighbors, len(rows) - left_out)
        self._neighbors = {}
        for layer, features in self._features(X[rows]).items():
            neighbors = ClassNeighbors("euclidean", self.algorithm, self.n_jobs)
            one_class = np.zeros(len(rows), dtype=np.int64)
            self._neighbors[layer] = neighbors.fit(features, one_class, n_classes=1)
        votes, _ = self._vote(X_calibration, own=calibration_rows if left_out else None)
        nonconformity = len(self.layers_) * self.n_neighbors_ - votes
        self._nonconformity = np.sort(nonconformity[np.arange(len(votes)), y_calibration])
        self.n_calibration_ = len(self._nonconformity)
        return self

    def predict(self, X):
        """Predict the classes of highest p-value; ties go by votes, then by distance.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n,)
            The classes.
        """
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def predict_proba(self, X):
        """Give the classes' shares of the neighbours, ties broken by distance.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            Votes, with less than half a vote for the distance, over their sum. p-values grow with
            the votes, so the order of the classes is that of the p-values, ties broken.
        """
        check_is_fitted(self)
        votes, closeness = self._vote(validate_rows(self, X))
        scores = votes + closeness / 2
        return scores / scores.sum(axis=1, keepdims=True)

    def p_values(self, X):
        """Give each class's p-value.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            Share of the calibration rows that conform with their class no better than the input
            does with this one.
        """
        check_is_fitted(self)
        votes, _ = self._vote(validate_rows(self, X))
        nonconformity = len(self.layers_) * self.n_neighbors_ - votes
        return conformal_p_values(
            nonconformity, self._nonconformity, count_own=self.p_value == "conformal"
        )

    def credibility(self, X):
        """Give the largest p-value: how well the training data support any answer.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n,), float64
            Between 0 and 1.
        """
        return self.p_values(X).max(axis=1)

    def confidence(self, X):
        """Give 1 minus the second largest p-value: how far all other answers are ruled out.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n,), float64
            Between 0 and 1; 1 if there is only one class.
        """
        p_values = np.sort(self.p_values(X), axis=1)
        return 1 - p_values[:, -2] if p_values.shape[1] > 1 else np.ones(len(p_values))

    def _vote(self, X, own=None):
        """Count the neighbours of each class, and say how close the nearest of them is.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
        own : ndarray of shape (n,), default=None
            Each row's index among the training rows, if it is one of them.

        Returns
        -------
        votes, closeness : ndarray of shape (n, n_classes), float64
            Closeness is in [0, 1): 0 where a class is not among the neighbours.
        """
        return neighbor_votes(
            self._features(X),
            self._neighbors,
            self._labels,
            n_neighbors=self.n_neighbors_,
            n_classes=len(self.classes_),
            own=own,
        )

    def _check_calibration(self):
        if len(self.calibration) != 2:
            raise ValueError(
                f"calibration must be a pair (X_cal, y_cal), got {len(self.calibration)} items."
            )
        X, y = self.calibration
        try:
            X = validate_rows(self, X)
        except ValueError as error:
            raise ValueError(f"calibration=(X_cal, y_cal): {error}") from error
        y = np.asarray(y)
        if y.shape != (len(X),):
            raise ValueError(
                f"calibration=(X_cal, y_cal): y_cal has shape {y.shape}, but X_cal has {len(X)} "
                "rows."
            )
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(
                f"calibration=(X_cal, y_cal): y_cal has classes that y has not: {unknown}."
            )
        return X, np.searchsorted(self.classes_, y)


def split_by_class(y, share, random_state):
    """Hold out a share of each class's rows, but never its last one.

    Parameters
    ----------
    y : ndarray of shape (n,)
        Classes, as integers from 0.
    share : float
    random_state : None, int or RandomState

    Returns
    -------
    kept, held_out : ndarray of int
        Indices of the rows, in ascending order.

    Raises
    ------
    ValueError
        If no class has two rows.
    """
    rng = check_random_state(random_state)
    held_out = []
    for c in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == c))
        n_held_out = min(len(rows) - 1, max(1, round(share * len(rows))))
        held_out.append(rows[:n_held_out])
    held_out = np.sort(np.concatenate(held_out))
    if len(held_out) == 0:
        raise ValueError(
            f"calibration={share} needs a class with 2 training rows or more, but n_samples="
            f"{len(y)} rows are all of different classes. Give (X_cal, y_cal) instead."
        )
    return np.setdiff1d(np.arange(len(y)), held_out), held_out
