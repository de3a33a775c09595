"""Threat scores as an outlier detector and a transformer."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import OneToOneFeatureMixin, OutlierMixin, TransformerMixin
from sklearn.utils import check_random_state

from ._base import (
    NETWORK_CONSTRAINTS,
    NetworkEstimator,
    prepare_fit,
    restore_on_error,
)
from ._compat import HasMethods, Interval, StrOptions, fit_context
from ._conformal import (
    MAX_EVIDENCE,
    ROUNDING,
    conformal_threshold,
    sample_rows,
    warn_of_few_rows,
)
from ._documentation import document
from ._validation import check_in_order, find_user_level, read_samples
from .features.outputs import LayerError
from .sensing import (
    CleanSamples,
    Evidence,
    any_needs_outputs,
    make_detectors,
    read_layers,
    score_clean,
    score_detection,
    score_new,
)
from .sensing.samples import OuterIndexes

# The methods of "auto": of each kind one, which are neighbours, the position of the features, and
# the stability of the prediction, unless the network's outputs are not the classes, or its input
# is of integers, which cannot change a little.
WITH_NETWORK = ("disagreement", "mahalanobis", "feature_squeezing")
FOR_TOKENS = ("disagreement", "mahalanobis")
WITHOUT_OUTPUTS = ("credibility", "mahalanobis")
WITHOUT_NETWORK = ("credibility",)

# Maximum number of calibration samples: enough for a false-alarm rate of 5 % to be met within a
# third of a point (one standard deviation).
MAX_CALIBRATION_SAMPLES = 5000

# Maximum number of neighbours, as a share of the clean samples. A clean sample is scored without
# itself, so with one sample fewer near it, and the larger the share, the more this matters: at
# alpha 0.1 the rate of "credibility" was 0.095 for a quarter of 60 samples of unbalanced classes,
# 0.105 for a third and 0.12 for half of them, that of "lid" 0.16 for all of 40 samples.
MAX_NEIGHBOR_SHARE = 0.25


@document
class ThreatScorer(TransformerMixin, OutlierMixin, NetworkEstimator):
    """Score how suspect a sample is, learned from clean data alone.

    The sensing step of RAILS as an outlier detector and a transformer. Clean samples, each left
    out of the training data in turn, set the scale: the threat of a sample is minus the log of its
    conformal p-value, summed over layers and methods, and a sample is flagged if its threat is
    higher than that of all but a share ``alpha`` of the clean samples.

    Parameters
    ----------
    %(feature_extractor)s
    layers : "auto", str, sequence of str, dict or None, default="auto"
        Layers in which samples are compared, as in ``module.named_modules()``. Within a
        :class:`RAILSClassifier`, the classifier's layers are taken.
        %(layers_auto)s
        A dict sets the layers of each method, such as
        ``{"mahalanobis": "output", "disagreement": ["conv1", "conv2"]}``. Leave out
        ``"feature_squeezing"`` and ``"confidence"``, which use no layers.
    method : str, outlier detector, or list of these, default="auto"
        What is scored, in each layer unless noted otherwise; the evidence of several methods is
        summed. ``"auto"`` takes ``["disagreement", "mahalanobis", "feature_squeezing"]`` with a
        network, and ``"credibility"`` without one. It leaves out ``"feature_squeezing"`` where the
        network takes integers. If the network has no output for each class of ``y``, as one that
        returns an embedding or a number, it warns and takes ``["credibility", "mahalanobis"]``.
        Choose methods to save time, or where an attack on your network shows that others flag
        more.

        - ``"credibility"``: how many of the k neighbours, over all layers, are not of the most
          frequent class [1]_;
        - ``"disagreement"``: by how much the nearest sample of another class is nearer than that
          of the class that the network predicts;
        - ``"distance"``: distance of the k-th neighbour on L2-normalised features [2]_;
        - ``"kernel_density"``: minus the log density of the predicted class, by a Gaussian kernel
          whose bandwidth is the median distance of the k-th neighbour [3]_;
        - ``"mahalanobis"``: squared Mahalanobis distance of the nearest class mean, by the
          covariance within the classes, shrunk [4]_ [5]_;
        - ``"lid"``: local intrinsic dimensionality of the k neighbours [6]_;
        - ``"feature_squeezing"``: how far the network's probabilities move when the input is
          rounded (to one bit for grey images, five for others) or, if it is an image, smoothed by
          a median filter, whatever the layers [7]_;
        - ``"confidence"``: the log odds against the label that the network predicts, whatever the
          layers [8]_. Choose it for adversarially trained networks: a normally trained one is
          surest of attacked samples;
        - an outlier detector with scikit-learn's or PyOD's interface, such as
          ``LocalOutlierFactor(novelty=True)``: its score. A clone is fitted to the features of each
          layer. Since it cannot leave samples out, half of the samples (5,000 at most), drawn at
          random, calibrate, and the clones are fitted to the others. If its ``random_state`` is
          None, the scorer draws it.
    alpha : float, default=0.05
        Maximum false-alarm rate on clean data (see Notes), taken as a decimal: 0.07 is exactly 7
        of 100.
    output : {"scores", "passthrough"}, default="scores"
        What ``transform`` returns: the threat scores, or X unchanged, so that the scorer can
        precede a classifier in a pipeline.
    n_neighbors : int, default=50
        Number of neighbours in each layer (k). Clipped to a quarter of the training samples, but
        not below 2 if there are 3 samples or more, so that the false-alarm rate holds: see Notes.
    %(input_shape)s
    %(device)s
    %(dtype)s
    %(batch_size)s

    random_state : int, RandomState or None, default=None
        Sets which samples calibrate, if not all do, how they are divided if several scores are
        combined, and the seeds of outlier detectors.

    Attributes
    ----------
    offset_ : float
        ``decision_function`` is ``score_samples`` minus this.
    methods_ : tuple of str
        The methods, in the order of the columns of ``transform``. That of an outlier detector is
        its class in lower case, such as ``"isolationforest"``, with a number if there are several.
    detectors_ : dict of str to Detector
        The fitted detector of each method.
    %(fitted)s
    layer_scores_ : LayerScores or None
        With ``layers="auto"`` and a network, how well the methods in each layer tell training
        samples attacked at growing radii from clean ones: the area under the ROC curve.
    n_neighbors_ : int
        Neighbours in each layer.
    n_calibration_ : int
        Number of clean samples that set the threshold.
    decision_scores_, labels_, threshold_ : ndarray of shape (n_calibration_,), and float
        Under the names that PyOD has for them: the threat of the samples that set the threshold,
        higher is more suspect; 1 where it exceeds the threshold, else 0; and the threshold,
        ``-offset_``.

    See Also
    --------
    RAILSClassifier : Takes a scorer as its ``threat_scorer``, and predicts with alarms.
    DkNNClassifier : Returns the credibility of its predictions.

    Notes
    -----
    The false-alarm rate on clean data that are like the samples of ``fit`` is at most ``alpha``.
    This is exact for ``"feature_squeezing"``, ``"confidence"`` and outlier detectors, and
    approximate for the other methods, since clean samples are scored without themselves, with one
    sample fewer among the neighbours. In the simulations of ``tests/test_rates.py`` the rate was at
    most ``alpha`` for every method, from 10 samples on, with up to a quarter of the samples as
    neighbours. It holds on average over the samples of ``fit``: the rate of a single fitted scorer
    varies about it with a standard deviation of about sqrt(alpha (1 - alpha) / ``n_calibration_``).
    Features of samples that the network was trained on differ from those of new ones: if there are
    enough, fit the scorer on clean samples that the network has not seen.

    A sample is always flagged, even if ``alpha`` is too small for any other to be flagged, if the
    network gives NaN or infinity, if a method's score is NaN, or if it is infinite and no
    calibration sample had the same infinity. Its threat is 1,000,000 or more, and finite. At most
    one in n + 1 clean samples has such an infinite score, for n calibration samples.

    As the ``threat_scorer`` of a :class:`~sklearn_rails.RAILSClassifier`, it takes what it leaves
    open from there: the network if ``feature_extractor`` is None, ``layers``, ``input_shape``,
    ``device``, ``batch_size``, and a seed. To score the input, set ``layers="input"``. A scorer
    with another network takes the seed alone.

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
    .. [8] D. Hendrycks, K. Gimpel, "A Baseline for Detecting Misclassified and Out-of-Distribution
       Examples in Neural Networks", ICLR 2017, arXiv:1610.02136.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import ThreatScorer
    >>> X, y = load_digits(return_X_y=True)
    >>> scorer = ThreatScorer(method="distance", random_state=0)
    >>> _ = scorer.fit(X[:1000], y[:1000])
    >>> noise = np.random.default_rng(0).uniform(0, 16, size=(20, 64))
    >>> bool((scorer.predict(noise) == -1).all())
    True
    """

    _parameter_constraints = {
        "feature_extractor": "no_validation",
        **NETWORK_CONSTRAINTS,
        "method": [str, list, tuple, HasMethods(["fit"])],
        "alpha": [Interval(Real, 0, 1, closed="neither")],
        "output": [StrOptions({"scores", "passthrough"})],
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        feature_extractor: Any = None,
        *,
        layers: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = "auto",
        method: Any = "auto",
        alpha: float = 0.05,
        output: str = "scores",
        n_neighbors: int = 50,
        input_shape: Sequence[int] | None = None,
        device: str | torch.device = "auto",
        dtype: str = "float32",
        batch_size: int | str = "auto",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
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

    # Set by an estimator that holds this one, for the time of ``fit``.
    _outer: OuterIndexes | None = None

    @restore_on_error
    @fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: ArrayLike | torch.Tensor, y: ArrayLike | torch.Tensor | None = None) -> Self:
        """Fit the detectors to clean samples, and set the threshold.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Clean samples, finite.
        y : array-like of shape (n,), default=None
            Their classes. None takes those that the network predicts; without a network either,
            all samples are of one class, and credibility depends on the distance alone. For
            ``"disagreement"`` and ``"kernel_density"`` the network needs an output for each class,
            in the order of the sorted classes; without a network, ``"kernel_density"`` takes all
            samples as one class, and ``"disagreement"``, ``"feature_squeezing"`` and
            ``"confidence"`` raise an error.

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
        rng = check_random_state(self.random_state)
        samples, targets = self._prepare(*read_samples(X, y), rng)
        self.methods_ = tuple(self.detectors_)
        n_samples = len(samples)
        is_held_out = not all(d.leaves_one_out for d in self.detectors_.values())
        needed = 4 if is_held_out else 2
        if n_samples < needed:
            raise ValueError(
                f"{type(self).__name__} needs {needed} samples or more, got {n_samples=}."
            )
        largest = max(2, int(MAX_NEIGHBOR_SHARE * (n_samples - 1)))
        self.n_neighbors_ = min(int(self.n_neighbors), largest, n_samples - 1)
        for method, detector in self.detectors_.items():
            detector.check(method, self.feature_map_, self.n_neighbors_)

        labels, self._n_classes = self._find_classes(samples, targets)
        size = n_samples // 2 if is_held_out else n_samples
        self_index = sample_rows(n_samples, min(size, MAX_CALIBRATION_SAMPLES), rng)
        training = np.setdiff1d(np.arange(n_samples), self_index) if is_held_out else None
        known = {}
        if self._outer is not None:
            known = self._outer.usable(self.feature_map_, labels, self._n_classes)
            labels = self._outer.labels if known else labels  # the same, stored once
        clean = CleanSamples(
            samples, labels, self._n_classes, self.n_neighbors_, self.feature_map_, training, known
        )
        for detector in self.detectors_.values():
            detector.fit(clean.in_layers(detector.layers))
        self._calibrate(score_clean(self.detectors_, clean, self_index), rng)
        return self

    def fit_predict(
        self, X: ArrayLike | torch.Tensor, y: ArrayLike | torch.Tensor | None = None
    ) -> NDArray[np.int64]:
        """Fit to clean samples, and flag those of them that would be flagged as new ones.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Clean samples, finite.
        y : array-like of shape (n,), default=None
            Their classes, as :meth:`fit` takes them.

        Returns
        -------
        ndarray of shape (n,), int64
            ``fit(X, y).predict(X)``: -1 for flagged samples, else 1. The samples are among their
            own neighbours, so the rate is not that of new clean data: it is lower for distances
            and densities, and higher for ``"disagreement"`` where ``y`` contradicts the network.
        """
        check_in_order(X)
        X, y = read_samples(X, y)
        return self.fit(X, y).predict(X)

    def transform(self, X: ArrayLike | torch.Tensor) -> ArrayLike | torch.Tensor:
        """Return the threat scores, or X unchanged.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Samples.

        Returns
        -------
        ndarray of shape (n, n_methods), float64, or X itself if ``output="passthrough"``
            One column for each method: the sum over layers of minus the log of the p-value.
            Higher is more suspect.
        """
        fitted, samples = self._validate(X)
        return X if fitted.output == "passthrough" else fitted._threat(samples)

    @property
    def threshold_(self) -> float:
        """The threat above which samples are flagged."""
        return -self.offset_

    @property
    def labels_(self) -> NDArray[np.int64]:
        """Which of the samples that set the threshold exceed it, as 0 and 1."""
        fitted = self._with({})  # read once
        labels: NDArray[np.int64] = (fitted.decision_scores_ > fitted.threshold_).astype(np.int64)
        return labels

    def get_feature_names_out(self, input_features: ArrayLike | None = None) -> NDArray[np.object_]:
        """Return the names of the columns of ``transform``.

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

    def score_samples(self, X: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
        """Return minus the threat, summed over the methods.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Samples.

        Returns
        -------
        ndarray of shape (n,), float64
            As outlier detectors have it: lower is more suspect.
        """
        return self._suspicion(X)[1]

    def decision_function(self, X: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
        """Compute the signed difference from the threshold.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Samples.

        Returns
        -------
        ndarray of shape (n,), float64
            ``score_samples(X) - offset_``: below 0 for flagged samples.
        """
        fitted, scores = self._suspicion(X)
        return scores - fitted.offset_

    def predict(self, X: ArrayLike | torch.Tensor) -> NDArray[np.int64]:
        """Flag samples that are more suspect than the threshold.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Samples.

        Returns
        -------
        ndarray of shape (n,), int64
            -1 for flagged samples, else 1.
        """
        return np.where(self.decision_function(X) < 0, -1, 1)

    def _suspicion(self, X: ArrayLike | torch.Tensor) -> tuple[Self, NDArray[np.float64]]:
        """Return the estimator as it was fitted, and minus the threat."""
        fitted, samples = self._validate(X)
        return fitted, -fitted._threat(samples).sum(axis=1)

    def _prepare(self, X: Any, y: Any, rng: np.random.RandomState) -> tuple[Any, Any]:
        """Check the data and the network, and create the detectors."""
        score = functools.partial(score_detection, method=self.method, n_neighbors=self.n_neighbors)
        of_method = read_layers(self.layers) if isinstance(self.layers, Mapping) else None
        layers = None if of_method is None else list(dict.fromkeys(chain(*of_method.values())))
        prepare = functools.partial(
            prepare_fit, self, X, y, network=self.feature_extractor, score=score, layers=layers
        )
        if not isinstance(self.method, str) or self.method != "auto":
            self.detectors_ = make_detectors(self.method, rng, of_method)
            return prepare(with_output=y is None or any_needs_outputs(self.detectors_))
        methods: tuple[str, ...]
        reason = None
        try:
            samples, targets = prepare(with_output=True)
        except LayerError as error:
            if y is None:
                raise
            reason = str(error)
        if reason is not None:  # the layers may be usable where the output is not
            samples, targets = prepare(with_output=False)
        if self.feature_map_.has_network and targets is not None and reason is None:
            try:
                n_classes = len(np.unique(targets))
                self.feature_map_.check_outputs(samples, n_classes, "'disagreement'")
            except ValueError as error:
                reason = str(error)
        if not self.feature_map_.has_network:
            methods = WITHOUT_NETWORK
        elif reason is not None:
            methods = WITHOUT_OUTPUTS
            warnings.warn(
                f"method='auto' uses {list(methods)}, which do not depend on the network's "
                f"outputs: {reason} Set method to choose others.",
                stacklevel=find_user_level(),
            )
        else:
            methods = FOR_TOKENS if self.feature_map_.integer_input else WITH_NETWORK
        self.detectors_ = make_detectors(methods, rng, of_method)
        return samples, targets

    def _find_classes(
        self, X: NDArray[Any] | torch.Tensor, y: NDArray[Any] | None
    ) -> tuple[NDArray[np.int64], int]:
        """Return the class of each clean sample as an integer, and the number of classes."""
        feature_map = self.feature_map_
        if y is not None:
            classes, labels = np.unique(y, return_inverse=True)
            if feature_map.has_network and any(d.needs_labels for d in self.detectors_.values()):
                feature_map.check_outputs(X, len(classes), f"method={self.method!r}")
            return labels, len(classes)
        if not feature_map.has_network:
            return np.zeros(len(X), dtype=np.int64), 1
        n_outputs = feature_map.outputs(X[:1]).shape[1]
        return feature_map.predict(X).cpu().numpy(), max(n_outputs, 2)

    def _threat(self, X: NDArray[Any] | torch.Tensor) -> NDArray[np.float64]:
        """Return the threat by each method, (n, n_methods)."""
        scores = score_new(
            self.detectors_, X, self.feature_map_, self._n_classes, self._evidence.n_scores
        )
        return self._evidence(scores)

    def _calibrate(self, scores: list[NDArray[np.float64]], rng: np.random.RandomState) -> None:
        """Set the scales and the threshold by the scores of clean samples."""
        for method, raw in zip(self.methods_, scores, strict=True):
            if np.isnan(raw).all(axis=0).any():
                raise ValueError(
                    f"method={self.method!r}: all scores of {method!r} are NaN for the samples of "
                    "X. Scale X, or use dtype='float64' or another method."
                )
        self._evidence = Evidence()
        self.decision_scores_ = threat = self._evidence.fit(scores, rng)
        self.n_calibration_ = len(threat)
        warn_of_few_rows(
            "alpha",
            self.alpha,
            len(threat),
            f"calibration samples, but there are {len(threat)}: nothing will be flagged. Give more "
            "samples or a larger alpha.",
        )
        # What cannot be compared is always flagged, and all else never if alpha is too small.
        threshold = conformal_threshold(threat, self.alpha)
        # A duplicate of a sample that is not flagged must not be flagged by rounding.
        self.offset_ = -min(threshold + ROUNDING * (1 + abs(threshold)), MAX_EVIDENCE / 2)
