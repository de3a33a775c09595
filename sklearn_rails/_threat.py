"""Threat scores as an outlier detector and a transformer."""

from numbers import Integral, Real
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import OneToOneFeatureMixin, OutlierMixin, TransformerMixin
from sklearn.utils import check_random_state

from ._base import (
    NEIGHBORS_ARE_STALE,
    NETWORK_CONSTRAINTS,
    NetworkEstimator,
    as_fitted,
    prepare_fit,
    restore_on_error,
    validate_rows,
)
from ._blocks import map_blocks
from ._compat import Interval, StrOptions, fit_context
from ._conformal import (
    MAX_EVIDENCE,
    ROUNDING,
    ConformalScale,
    conformal_threshold,
    sample_rows,
    warn_of_few_rows,
)
from .sensing.detectors import NEEDS_LABELS, NEEDS_OUTPUTS, SENSORS, CleanSamples, Query

# Rows that calibrate, each left out of its own neighbours: enough for a false-alarm rate of 5 %
# to be met within a third of a point (one standard deviation).
MAX_CALIBRATION_ROWS = 5000

# A clean row is scored without itself, so with one row fewer to be near. The larger the share of
# the rows that are neighbours, the more this matters: at alpha 0.1 the rate of "credibility" was
# 0.095 for a quarter of 60 rows of unbalanced classes, 0.105 for a third and 0.12 for half of them,
# that of "lid" 0.16 for all of 40 rows.
MAX_NEIGHBOR_SHARE = 0.25


class ThreatScorer(TransformerMixin, OutlierMixin, NetworkEstimator):
    """How suspect an input is, judged by clean data alone.

    The sensing step of RAILS as an outlier detector and a transformer. Scores of clean rows, each
    left out of the training data in its turn, are the measure: a row's threat is minus the log of
    its conformal p-value, summed over layers and methods, and an alarm is raised where it is
    higher than all but a share ``alpha`` of the clean rows'.

    Parameters
    ----------
    feature_extractor : None, torch.nn.Module, fitted skorch net, FrozenModule or \
            TorchFeatureExtractor, default=None
        The fitted network. None takes the input itself as the only layer.
    layers : str or sequence of str, default=None
        Layers that are looked at, as in ``module.named_modules()``. None takes the extractor's own
        layers, else the network's output.
    method : str or list of str, default="credibility"
        What is scored, in each layer unless it says otherwise; of a list, the evidence is added up.

        - ``"credibility"``: how many of the k neighbours, over all layers, are not of the most
          frequent class [1]_;
        - ``"disagreement"``: by how much the nearest row of another class is nearer than that of
          the class that the network predicts;
        - ``"distance"``: distance of the k-th neighbour on L2-normalised features [2]_;
        - ``"kernel_density"``: minus the log density of the predicted class, by a Gaussian kernel
          whose bandwidth is the median distance of the k-th neighbour [3]_;
        - ``"mahalanobis"``: squared Mahalanobis distance of the nearest class mean, by the
          covariance within the classes, shrunk [4]_ [5]_;
        - ``"lid"``: local intrinsic dimensionality of the k neighbours [6]_;
        - ``"feature_squeezing"``: how far the network's probabilities move when the input is
          rounded (to one bit for grey images, five for others) or, if it is an image, smoothed by
          a median filter, not layer by layer [7]_.
    alpha : float, default=0.05
        Maximum false-alarm rate on clean data (see Notes). Its decimal text counts: 0.07 is
        exactly 7 of 100.
    output : {"scores", "passthrough"}, default="scores"
        What ``transform`` gives: the threat scores, or X unchanged, so that the scorer can stand
        before a classifier in a pipeline.
    n_neighbors : int, default=50
        Neighbours in each layer (k). Clipped to a quarter of the training rows (but 2 where there
        are so many), for the false-alarm rate to hold: see Notes.
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
    random_state : int, RandomState or None, default=None
        Decides which rows calibrate, where there are more than 5,000, and how they are divided
        where several scores are combined.

    Attributes
    ----------
    offset_ : float
        ``decision_function`` is ``score_samples`` minus this.
    methods_ : tuple of str
        The methods, in the order of the columns of ``transform``.
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
        Clean rows that set the threshold.
    device_ : torch.device
        Where the computation runs.

    See Also
    --------
    RAILSClassifier : Takes a scorer as its ``threat_scorer``.
    DkNNClassifier : Gives the credibility of its answers.

    Notes
    -----
    The alarm rate on clean data is at most ``alpha`` if they are like the rows of ``fit``, but for
    one row more or less among the neighbours: a clean row is scored without itself. So it is
    exact for ``"feature_squeezing"`` alone, and approximate for the other methods. In the
    simulations of ``tests/test_rates.py`` it was at most ``alpha`` for every method, from 10 rows
    on, with up to a quarter of the rows as neighbours. A rate holds on average over the rows of
    ``fit``: that of a single fitted scorer varies about it with a standard deviation of about
    sqrt(alpha (1 - alpha) / ``n_calibration_``). A network's features of the rows it was
    trained on are not like others: fit the scorer on clean rows that the network has not seen,
    where there are enough of them.

    A sample is always flagged, even if ``alpha`` is too small for any other alarm, where the
    network gives NaN or infinity, or where a method's score is NaN, or infinite in a way that no
    calibration row's was. Its threat is 1,000,000 or more, and finite. Of clean samples at most
    one in n + 1 has such an infinite score, for n calibration rows.

    References
    ----------
    .. [1] N. Papernot, P. McDaniel, "Deep k-Nearest Neighbors: Towards Confident, Interpretable
       and Robust Deep Learning", 2018, arXiv:1803.04765.
    .. [2] Y. Sun, Y. Ming, X. Zhu, Y. Li, "Out-of-Distribution Detection with Deep Nearest
       Neighbors", ICML 2022.
    .. [3] R. Feinman, R. Curtin, S. Shintre, A. Gardner, "Detecting Adversarial Samples from
       Artifacts", 2017, arXiv:1703.00410.
    .. [4] K. Lee, K. Lee, H. Lee, J. Shin, "A Simple Unified Framework for Detecting
       Out-of-Distribution Samples and Adversarial Attacks", NeurIPS 2018.
    .. [5] O. Ledoit, M. Wolf, "A Well-Conditioned Estimator for Large-Dimensional Covariance
       Matrices", Journal of Multivariate Analysis 88, 2004.
    .. [6] X. Ma et al., "Characterizing Adversarial Subspaces Using Local Intrinsic
       Dimensionality", ICLR 2018.
    .. [7] W. Xu, D. Evans, Y. Qi, "Feature Squeezing: Detecting Adversarial Examples in Deep Neural
       Networks", NDSS 2018.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import ThreatScorer
    >>> X, y = load_digits(return_X_y=True)
    >>> scorer = ThreatScorer(method="distance", random_state=0).fit(X[:1000], y[:1000])
    >>> noise = np.random.default_rng(0).uniform(0, 16, size=(20, 64))
    >>> bool((scorer.predict(noise) == -1).all())
    True
    """

    _parameter_constraints = {
        "feature_extractor": "no_validation",
        **NETWORK_CONSTRAINTS,
        "method": [StrOptions(set(SENSORS)), list, tuple],
        "alpha": [Interval(Real, 0, 1, closed="neither")],
        "output": [StrOptions({"scores", "passthrough"})],
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        feature_extractor=None,
        *,
        layers=None,
        method="credibility",
        alpha=0.05,
        output="scores",
        n_neighbors=50,
        input_shape=None,
        device="auto",
        dtype="float32",
        batch_size="auto",
        random_state=None,
    ):
        self.feature_extractor = feature_extractor
        self.layers = layers
        self.method = method
        self.alpha = alpha
        self.output = output
        self.n_neighbors = n_neighbors
        self.input_shape = input_shape
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.random_state = random_state

    @restore_on_error
    @fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: ArrayLike | torch.Tensor, y: ArrayLike | torch.Tensor | None = None) -> Self:
        """Learn what clean rows look like.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Clean inputs, finite.
        y : array-like of shape (n,), default=None
            Their classes. None takes those that the network predicts; without a network either,
            all rows are of one class, and credibility is a matter of the distance alone. For
            ``"disagreement"`` and ``"kernel_density"`` the network needs an output for each class,
            in the order of the sorted classes; without a network, ``"kernel_density"`` takes all
            rows as one class, and ``"disagreement"`` and ``"feature_squeezing"`` cannot be had.

        Returns
        -------
        ThreatScorer
            The estimator itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or the data is invalid, the network does not fit the data, or a layer or
            the device is not there. The estimator is then as it was before.
        """
        self.methods_ = self._check_methods()
        needs_output = y is None or bool(set(self.methods_) & {*NEEDS_LABELS, *NEEDS_OUTPUTS})
        X, y = prepare_fit(self, X, y, network=self.feature_extractor, with_output=needs_output)
        if len(X) < 2:
            raise ValueError(f"{type(self).__name__} needs 2 rows or more, got n_samples={len(X)}.")
        n_others = len(X) - 1
        most = max(2, int(MAX_NEIGHBOR_SHARE * n_others))
        self.n_neighbors_ = min(int(self.n_neighbors), most, n_others)
        self._check_network(X)

        labels, self._n_classes = self._find_classes(X, y)
        features = self._features(X)
        clean = CleanSamples(
            X, features, labels, self._n_classes, self.n_neighbors_, self._features
        )
        self._sensors = [SENSORS[method](clean) for method in self.methods_]
        rng = check_random_state(self.random_state)
        own = sample_rows(len(X), MAX_CALIBRATION_ROWS, rng)

        def sense(block):
            rows = own[block]
            here = {layer: f[rows] for layer, f in features.items()}
            return self._sense(X[rows], here, self._outputs(X[rows]), rows)

        self._calibrate(
            map_blocks(sense, len(own), self._features.row_bytes, self._features.device), rng
        )
        return self

    def fit_predict(
        self, X: ArrayLike | torch.Tensor, y: ArrayLike | torch.Tensor | None = None
    ) -> np.ndarray:
        """Fit to clean data, and flag samples of it as if they were new.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Clean inputs, finite.
        y : array-like of shape (n,), default=None
            Their classes, as :meth:`fit` takes them.

        Returns
        -------
        ndarray of shape (n,), int64
            ``fit(X, y).predict(X)``: -1 for an alarm, else 1. The samples are among their own
            neighbours, so the rate is not that of new clean data: it is lower for distances and
            densities, and higher for ``"disagreement"`` where ``y`` contradicts the network.
        """
        return self.fit(X, y).predict(X)

    def transform(self, X: ArrayLike | torch.Tensor) -> ArrayLike | torch.Tensor:
        """Give the threat scores, or X unchanged.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n, n_methods), float64, or X itself if ``output="passthrough"``
            One column a method: the sum over layers of minus the log of the p-value. Higher is
            more suspect.
        """
        fitted = self._as_fitted()
        rows = validate_rows(fitted, X)
        return X if fitted.output == "passthrough" else fitted._weigh(rows)

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> np.ndarray:
        """Name the columns of ``transform``.

        Parameters
        ----------
        input_features : array-like of str, default=None
            Names of the inputs, for ``output="passthrough"``.

        Returns
        -------
        ndarray of str
            ``"threat_<method>"``, or the inputs' names.
        """
        if self._as_fitted().output == "passthrough":
            return OneToOneFeatureMixin.get_feature_names_out(self, input_features)
        return np.array([f"threat_{method}" for method in self.methods_], dtype=object)

    def score_samples(self, X: ArrayLike | torch.Tensor) -> np.ndarray:
        """Give minus the threat, summed over the methods.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n,), float64
            As outlier detectors have it: lower is more suspect.
        """
        fitted = self._as_fitted()
        return -fitted._weigh(validate_rows(fitted, X)).sum(axis=1)

    def decision_function(self, X: ArrayLike | torch.Tensor) -> np.ndarray:
        """Give the distance from an alarm.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n,), float64
            ``score_samples(X) - offset_``: below 0 for an alarm.
        """
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike | torch.Tensor) -> np.ndarray:
        """Raise alarms.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n,), int64
            -1 for an alarm, else 1.
        """
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _check_methods(self):
        methods = (self.method,) if isinstance(self.method, str) else tuple(self.method)
        unknown = [m for m in methods if m not in SENSORS]
        if unknown or not methods or len(set(methods)) < len(methods):
            raise ValueError(
                f"method={self.method!r} must be one of {sorted(SENSORS)}, or a list that names "
                "one or more of them once."
            )
        return methods

    def _as_fitted(self):
        return as_fitted(self, consequence=NEIGHBORS_ARE_STALE)

    def _check_network(self, X):
        about = [m for m in self.methods_ if m in NEEDS_OUTPUTS]
        if about and not self._features.has_network:
            raise ValueError(
                f"method={self.method!r}: {about[0]!r} is about a network's answers, but there is "
                "no network: give a feature_extractor, or another method."
            )
        if "feature_squeezing" in self.methods_ and self._features.integer_input:
            raise ValueError(
                f"method={self.method!r}: 'feature_squeezing' rounds the input, but the network "
                "takes integers such as token ids, which cannot be rounded. Use another method."
            )
        if "lid" in self.methods_ and self.n_neighbors_ < 2:
            raise ValueError(
                f"method={self.method!r}: 'lid' compares distances of neighbours and needs 2 or "
                f"more, but n_neighbors={self.n_neighbors} and there are {len(X)} rows."
            )

    def _find_classes(self, X, y):
        if y is not None:
            classes, labels = np.unique(y, return_inverse=True)
            if self._features.has_network and set(self.methods_) & set(NEEDS_LABELS):
                self._features.check_outputs(X, len(classes), f"method={self.method!r}")
            return labels, len(classes)
        if not self._features.has_network:
            return np.zeros(len(X), dtype=np.int64), 1
        n_outputs = self._features.outputs(X[:1]).shape[1]
        return self._features.predict(X).cpu().numpy(), max(n_outputs, 2)

    def _outputs(self, X, *, check_finite=True):
        """Return the network's outputs, or None if no method is about them."""
        about_outputs = set(self.methods_) & {*NEEDS_LABELS, *NEEDS_OUTPUTS}
        if not about_outputs or not self._features.has_network:
            return None
        return self._features.outputs(X, check_finite=check_finite)

    def _sense(self, X, features, outputs, own=None):
        """Return every method's raw scores: a list of arrays (n, n_scores)."""
        rows = Query(X, features, self._features, own)
        if outputs is not None:
            rows.outputs = outputs
            # With one class, both labels of a single output are that class.
            rows.labels = self._features.label(outputs).clamp(max=self._n_classes - 1)
        return [sensor(rows) for sensor in self._sensors]

    def _sense_new(self, X):
        """Return every method's raw scores, NaN where the network gives NaN or infinity."""
        features = self._features(X, check_finite=False)
        outputs = self._outputs(X, check_finite=False)
        finite = torch.ones(len(X), dtype=torch.bool, device=self._features.device)
        for values in (*features.values(), *(() if outputs is None else (outputs,))):
            finite &= torch.isfinite(values).all(dim=1)
        if finite.all():
            return self._sense(X, features, outputs)
        scores = [np.full((len(X), len(scales)), np.nan) for scales in self._scales]
        if finite.any():
            kept = finite.nonzero()[:, 0].cpu().numpy()
            features = {layer: f[kept] for layer, f in features.items()}
            outputs = None if outputs is None else outputs[kept]
            for raw, of_kept in zip(scores, self._sense(X[kept], features, outputs), strict=True):
                raw[kept] = of_kept
        return scores

    def _weigh(self, X):
        return self._evidence(
            map_blocks(
                lambda block: self._sense_new(X[block]),
                len(X),
                self._features.row_bytes,
                self._features.device,
            )
        )

    def _evidence(self, scores):
        columns = [
            sum(scale(column) for scale, column in zip(scales, raw.T, strict=True))
            for scales, raw in zip(self._scales, scores, strict=True)
        ]
        return np.stack(columns, axis=1)

    def _calibrate(self, scores, rng):
        """Set the scales and the threshold on the scores of clean rows."""
        for method, raw in zip(self.methods_, scores, strict=True):
            if np.isnan(raw).all(axis=0).any():
                raise ValueError(
                    f"method={self.method!r}: all scores of {method!r} are NaN for the rows of X. "
                    "Scale X, or use dtype='float64' or another method."
                )
        n_rows = len(scores[0])
        for_scales = for_threshold = np.arange(n_rows)
        if sum(raw.shape[1] for raw in scores) > 1:
            # Added up, p-values are no p-value: the sum is judged by rows that did not scale it.
            for_scales = sample_rows(n_rows, n_rows // 2, rng)
            for_threshold = np.setdiff1d(for_threshold, for_scales)
        self._scales = [[ConformalScale(c, for_scales) for c in raw.T] for raw in scores]
        threat = self._evidence([raw[for_threshold] for raw in scores]).sum(axis=1)
        self.n_calibration_ = len(threat)
        warn_of_few_rows(
            "alpha",
            self.alpha,
            len(threat),
            f"calibration rows, but there are {len(threat)}: no alarm will be raised. Give more "
            "rows or a larger alpha.",
        )
        # What cannot be compared is always flagged, and all else never if alpha is too small.
        threshold = conformal_threshold(threat, self.alpha)
        # A duplicate of a row that is not flagged must not be flagged by rounding.
        self.offset_ = -min(threshold + ROUNDING * (1 + abs(threshold)), MAX_EVIDENCE / 2)
