"""The RAILS classifier: parameters, documentation, and methods that ask the engine."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted

from ._base import (
    NETWORK_CONSTRAINTS,
    NetworkClassifier,
    fill_open_parameters,
    prepare_fit,
    restore_on_error,
    validate_rows,
)
from ._compat import HasMethods, Interval, StrOptions, fit_context
from ._documentation import document
from ._threat import ThreatScorer
from ._validation import (
    check_known_labels,
    check_label_kind,
    check_same_length,
    naming,
    read_in_order,
    read_samples,
    validate_labels,
)
from .features.layer_choice import LayerScores, score_layers
from .immune import Arbitration, ImmuneEngine, ImmuneResponse, MemoryBank, Triage
from .immune.alarms import check_alarms, check_threat_scores
from .immune.build import build_engine
from .immune.consensus import normalize_votes, top_count
from .immune.maturation import Schedule
from .immune.memory import select_memories
from .immune.random import Mutation, draw_seed
from .neighbors import ClassNeighbors
from .neighbors.index import ALGORITHM_CONSTRAINT, LARGEST_SIZE, N_JOBS_CONSTRAINT
from .sensing.samples import OuterIndexes

# Number of cells in a population, unless there are more classes.
DEFAULT_POPULATION_SIZE = 150


def _raises_alarms(estimator: Any) -> bool:
    """Check for a threat scorer with ``predict``: that of fit, or the parameter before fit."""
    is_fitted = hasattr(estimator, "engine_")
    scorer = getattr(estimator, "threat_scorer_" if is_fitted else "threat_scorer", None)
    if not hasattr(scorer, "predict"):
        raise AttributeError(
            "predict_with_alarm needs a threat_scorer with predict: set one, as in "
            f"RAILSClassifier(..., threat_scorer=ThreatScorer()), and call fit; got {scorer!r}."
        )
    return True


@document
class RAILSClassifier(NetworkClassifier):
    """Robust predictions from a fitted network by affinity maturation (RAILS).

    For each input, RAILS finds the most similar training examples of every class in a hidden layer
    (flocking), evolves them toward the input with a genetic algorithm (affinity maturation), and
    takes a majority vote of the offspring most similar to it (plasma). The network is not
    retrained: it defines the space in which similarity (affinity) is measured.

    Parameters
    ----------
    %(feature_extractor)s
    layers : "auto", str, sequence of str or None, default="auto"
        Hidden layers, as in ``module.named_modules()``; each has a population of its own, and all
        of them vote.
        %(layers_auto)s
    n_neighbors : int, default=10
        Number of neighbours of each class in a layer (k). Clipped where a class has fewer training
        examples.
    population_size : int or "auto", default="auto"
        Number of cells in a population (T), shared equally by the classes in the beginning.
        ``"auto"`` is 150, or the number of classes if that is more.
    generations : int, default=3
        Maximum number of generations (G). Accuracy under attack rises for two or three and then
        stays or falls: a population that can match anything matches the perturbation too.
    tau : float or "scale", default="scale"
        Temperature of selection, in units of the affinity. ``"scale"`` is, in each layer, a fifth
        of the median spread (standard deviation) of the affinities between a training example and
        its flocked neighbours.
    rho : float, default=0.15
        Probability that mutation changes an element.
    delta_min, delta_max : float, default=0.05 and 0.15
        Smallest and largest size of a mutation. Where the cells' space is not within [0, 1], in
        units of each feature's range over the training data.
    plasma_fraction, memory_fraction : float, default=0.05 and 0.25
        Share of the final population, by affinity, that votes, and that is kept as memory.
    memory_capacity : int, default=1000
        Maximum number of cells that are remembered in each layer, in equal shares of the classes;
        see :meth:`remember`.
    affinity : {"euclidean", "cosine", "inner_product"} or callable, default="euclidean"
        Minus the distance of features, their cosine, or their inner product. A callable takes two
        tensors of shape (n, n_layer_features) and returns one of shape (n,), higher for closer.
    selection : {"global", "class_balanced"}, default="global"
        Parents are drawn from the whole population, or the same number within each class.
    crossover : {"affinity", "uniform"}, default="affinity"
        An element comes from the first parent with a probability that is the softmax of the two
        parents' affinities over tau, or a half.
    start_layer : str, default=None
        The layer in whose output space cells live; ``layers`` must come after it. None for the
        input.
    clip : "auto", None or pair of float, default="auto"
        Bounds of the cells: [0, 1] if all training values lie in it, else each feature's range.
    gate : None, Arbitration or Triage, default=None
        Which samples are bred. None breeds all of them, as the paper does.
        :class:`~sklearn_rails.immune.Arbitration` keeps the network's prediction unless the
        neighbours contradict it; :class:`~sklearn_rails.immune.Triage` breeds only what the
        ``threat_scorer`` flags. Their parameters can be searched, as ``gate__alpha``.
    early_stopping : bool, default=True
        Do not breed a sample whose vote is settled, nor breed it further. Settled means that the
        plasma is unanimous, and either its class leads all others in affinity by four times
        ``tau`` (or the value of ``tau="scale"``, if that is more), or it was unanimous for the
        same class one generation before. A flock that leads so far settles the vote too: most
        clean samples are not bred at all. False breeds all generations.
    compile : bool, default=False
        Cross over and mutate by a function that ``torch.compile`` makes of both, which takes
        seconds to a minute in the first ``fit``. Predictions are the same, and faster where the
        network is so small that breeding takes a good part of the time.
    algorithm : {"auto", "brute", "kd_tree", "ball_tree"}, ExactNeighbors or estimator, \
            default="auto"
        How neighbours are found: an exact matrix product on the device,
        :class:`~sklearn_rails.neighbors.ExactNeighbors` with another ``storage`` for it,
        scikit-learn's :class:`~sklearn.neighbors.NearestNeighbors`, or an estimator with
        ``kneighbors`` that is cloned for every class. The last two need a distance: Euclidean or
        cosine affinity.
    %(train_network)s
    %(input_shape)s
    threat_scorer : estimator, default=None
        An outlier detector with ``score_samples``, such as
        :class:`~sklearn_rails.ThreatScorer`. A clone is fitted to the training data, and its
        scores go into the responses. It changes no prediction unless the gate is a ``Triage``.
        What a ``ThreatScorer()`` leaves open is taken from this classifier: the network,
        ``layers``, ``input_shape``, ``device``, ``batch_size`` and the seed; one with another
        network keeps all but its seed. One that is fitted, such as on clean data that the network
        was not trained on, is used as it is in a :class:`~sklearn.frozen.FrozenEstimator`.
    %(device)s
    %(dtype)s
    %(batch_size)s
    n_jobs : int, default=None
        Number of threads, each of which predicts blocks of samples, and of threads for the indexes
        of ``algorithm``.
    random_state : int, RandomState or None, default=None
        Seed of the random numbers. After fit, predictions are deterministic: they do not depend on
        batch composition, order or repetition.
    verbose : int, default=0
        1 shows a progress bar over the samples: in ``fit`` those that are indexed, in ``predict``
        with the share of their populations that is decided.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The class labels.
    %(fitted)s
    %(layer_scores)s
    tau_ : dict of str to float
        The temperature in each layer.
    n_neighbors_ : ndarray of shape (n_classes,)
        Number of neighbours that are flocked in each class.
    neighbors_ : dict of str to ClassNeighbors
        The neighbour structure of each layer, of the training data.
    memory_ : dict of str to MemoryBank
        The remembered cells of each layer: ``cells`` and their ``labels``, positions in
        ``classes_``.
    engine_ : ImmuneEngine
        What ``fit`` builds and ``predict`` runs, immutable.
    seed_ : int
        The random numbers are a function of it, the layer and the generation.
    threat_scorer_ : estimator
        The fitted threat scorer, if there is one.

    See Also
    --------
    DkNNClassifier : The baseline: a vote of neighbours in hidden layers, with its credibility.
    ThreatScorer : Detect attacked and shifted inputs: the usual ``threat_scorer``.

    Notes
    -----
    The algorithm is Algorithm 1 of [1]_. The paper leaves open how affinity decides on the
    cross-over; here the fitter parent contributes more (see ``crossover``). A training sample is
    among its own neighbours when it is predicted.

    References
    ----------
    .. [1] R. Wang, T. Chen, S. Lindsly, C. Stansbury, I. Rajapakse, A. Hero, "Immuno-mimetic Deep
       Neural Networks (Immuno-Net)", 2021, arXiv:2107.02842.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import RAILSClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X / 16
    >>> rails = RAILSClassifier(population_size=100, random_state=0)
    >>> _ = rails.fit(X[:1000], y[:1000])
    >>> round(rails.score(X[1000:1050], y[1000:1050]), 1)
    1.0
    """

    _parameter_constraints = {
        "feature_extractor": "no_validation",
        **NETWORK_CONSTRAINTS,
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "population_size": [
            StrOptions({"auto"}),
            Interval(Integral, 1, LARGEST_SIZE, closed="both"),
        ],
        "generations": [Interval(Integral, 0, LARGEST_SIZE, closed="both")],
        "tau": [StrOptions({"scale"}), Interval(Real, 0, None, closed="neither")],
        "rho": [Interval(Real, 0, 1, closed="both")],
        "delta_min": [Interval(Real, 0, None, closed="left")],
        "delta_max": [Interval(Real, 0, None, closed="left")],
        "plasma_fraction": [Interval(Real, 0, 1, closed="right")],
        "memory_fraction": [Interval(Real, 0, 1, closed="right")],
        "memory_capacity": [Interval(Integral, 1, None, closed="left")],
        "affinity": [str, callable],
        "selection": [StrOptions({"global", "class_balanced"})],
        "crossover": [StrOptions({"affinity", "uniform"})],
        "start_layer": [None, str],
        "clip": [StrOptions({"auto"}), None, "array-like"],
        "gate": [None, HasMethods(["calibrate", "screen"])],
        "early_stopping": ["boolean"],
        "compile": ["boolean"],
        "algorithm": ALGORITHM_CONSTRAINT,
        "train_network": ["boolean"],
        "threat_scorer": [None, HasMethods(["fit", "score_samples"])],
        "n_jobs": N_JOBS_CONSTRAINT,
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    layer_scores_: LayerScores | None
    engine_: ImmuneEngine
    _labels: NDArray[np.int64]
    _rows: Any

    def __init__(
        self,
        feature_extractor: object = None,
        *,
        layers: str | Sequence[str] | None = "auto",
        n_neighbors: int = 10,
        population_size: int | str = "auto",
        generations: int = 3,
        tau: float | str = "scale",
        rho: float = 0.15,
        delta_min: float = 0.05,
        delta_max: float = 0.15,
        plasma_fraction: float = 0.05,
        memory_fraction: float = 0.25,
        memory_capacity: int = 1000,
        affinity: str | Callable[..., Any] = "euclidean",
        selection: str = "global",
        crossover: str = "affinity",
        start_layer: str | None = None,
        clip: str | tuple[float, float] | None = "auto",
        gate: Arbitration | Triage | None = None,
        early_stopping: bool = True,
        compile: bool = False,
        algorithm: object = "auto",
        train_network: bool = False,
        input_shape: tuple[int, ...] | None = None,
        threat_scorer: object = None,
        device: str | torch.device = "auto",
        dtype: str = "float32",
        batch_size: int | str = "auto",
        n_jobs: int | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.feature_extractor = feature_extractor
        self.layers = layers
        self.n_neighbors = n_neighbors
        self.population_size = population_size
        self.generations = generations
        self.tau = tau
        self.rho = rho
        self.delta_min = delta_min
        self.delta_max = delta_max
        self.plasma_fraction = plasma_fraction
        self.memory_fraction = memory_fraction
        self.memory_capacity = memory_capacity
        self.affinity = affinity
        self.selection = selection
        self.crossover = crossover
        self.start_layer = start_layer
        self.clip = clip
        self.gate = gate
        self.early_stopping = early_stopping
        self.compile = compile
        self.algorithm = algorithm
        self.train_network = train_network
        self.input_shape = input_shape
        self.threat_scorer = threat_scorer
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @restore_on_error
    @fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: ArrayLike | torch.Tensor, y: ArrayLike | torch.Tensor | None = None) -> Self:
        """Index the training data's features, class by class.

        Parameters
        ----------
        %(X_train)s
        y : array-like of shape (n,)
            Their classes. None takes those of a data set of pairs.

        Returns
        -------
        RAILSClassifier
            The estimator itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or the data is invalid, the network does not fit the data, or a layer or
            the device does not exist. The estimator is then as it was before.
        """
        self._check_parameters()
        X, y = read_samples(X, y)
        rows, labels = prepare_fit(
            self,
            X,
            y,
            network=self.feature_extractor,
            start_layer=self.start_layer,
            with_output=getattr(self.gate, "needs_network", False),
            score=score_layers,
        )
        named = self.__dict__.pop("_named_classes", None)  # by partial_fit
        self._classes_are_named = named is not None
        self.classes_ = np.unique(labels if named is None else named)
        check_known_labels(labels, self.classes_, "classes")
        self.seed_ = draw_seed(self.random_state)
        # The shape in which a threat scorer gets more samples in partial_fit.
        is_flat = len(self.input_shape_) == 1 or getattr(X, "ndim", 0) == 2
        self._given_shape = (self.n_features_in_,) if is_flat else self.input_shape_
        self._build(rows, labels, (X, y))
        return self

    @restore_on_error
    @fit_context(prefer_skip_nested_validation=False)
    def partial_fit(
        self,
        X: ArrayLike | torch.Tensor,
        y: ArrayLike | torch.Tensor | None = None,
        classes: ArrayLike | None = None,
    ) -> Self:
        """Add labelled training data, and keep the remembered cells.

        Parameters
        ----------
        %(X_train)s
        y : array-like of shape (n,)
            Their classes. None takes those of a data set of pairs.
        classes : array-like of shape (n_classes,), default=None
            All classes that will ever come, those without a sample included; others are then an
            error. A class without samples has no neighbours and gets no votes.

        Returns
        -------
        RAILSClassifier
            The estimator itself, as if :meth:`fit` had got all samples so far. Those of earlier
            calls do not pass through the network again, unless it has changed, their features are
            kept in half precision, or a ``threat_scorer`` is fitted anew.

        Raises
        ------
        TypeError, ValueError
            As :meth:`fit`; or if the samples do not fit those before, or have a class that is not
            in ``classes``. The estimator is then as it was before.
        """
        X, y = read_samples(X, y)
        if not hasattr(self, "classes_"):
            if classes is not None:
                self._named_classes = validate_labels(classes, name="classes")
            return self.fit(X, y)
        labels, known = validate_labels(y), self.classes_
        if classes is not None:
            classes = validate_labels(classes, name="classes")
            check_known_labels(labels, classes, "classes")
        elif self._classes_are_named:
            check_known_labels(labels, known, "the classes of the first call")
        check_label_kind(labels, known)
        # All samples are indexed anew, by the network as it is now.
        self._features.follow_network()
        has_changed = self._features.network_has_changed
        self._features = self._features.rebased()
        rows = validate_rows(self, X)
        check_same_length(X=rows, y=labels)
        named = [] if classes is None else [classes]
        with naming("y" if classes is None else "classes"):
            self.classes_ = np.unique(np.concatenate([known, labels, *named]))
        to_device = self._features.to_device
        memory = self.engine_.memory
        before = self._rows
        if before is None:
            before = self.engine_.layers[0].bank.cells
        rows = torch.cat([to_device(before), to_device(rows)])
        rows = rows.numpy() if rows.device.type == "cpu" else rows
        labels = np.concatenate([known[self._labels], labels])
        given = rows.reshape(len(rows), *self._given_shape), labels
        self._build(rows, labels, given, extend=not has_changed)
        places = np.searchsorted(self.classes_, known)
        n_classes = len(self.classes_)
        self.engine_ = self.engine_.with_memory(
            {layer: bank.with_classes(n_classes, places) for layer, bank in memory.items()}
        )
        return self

    def predict(self, X: ArrayLike | torch.Tensor) -> NDArray[Any]:
        """Predict classes.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        ndarray of shape (n,)
            The class with the highest score.
        """
        fitted, scores = self._scores(X)
        return fitted.classes_[scores.argmax(axis=1)]

    def predict_proba(self, X: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
        """Return the classes' shares of the plasma's votes, with affinity as a tie-breaker.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            The scores of ``decision_function``, class by class, over their sum.
        """
        return normalize_votes(self._scores(X)[1])

    def decision_function(self, X: ArrayLike | torch.Tensor) -> NDArray[np.float64]:
        """Return the number of votes for each class, with affinity as a tie-breaker.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        ndarray of shape (n, n_classes), or (n,) for two classes, float64
            Number of plasma cells of all layers that are of the class, plus at most half a vote
            that grows with the highest affinity in the class. For two classes the difference,
            positive for ``classes_[1]``. With ``gate=Arbitration()``, a label of the network that
            is kept has all votes.
        """
        _, scores = self._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def kneighbors(
        self, X: ArrayLike | torch.Tensor
    ) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[np.int64]]]:
        """Find the flocked neighbours: the training examples that explain a prediction.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        distances : dict of str to ndarray of shape (n, n_classes, n_neighbors)
            Minus the affinity, in each layer, smallest first; for the Euclidean affinity the
            distance. Infinite where a class has no more examples.
        indices : dict of str to ndarray of shape (n, n_classes, n_neighbors)
            Positions in the training data, and after its end in ``memory_[layer].cells``; -1 where
            a class has no more examples.
        """
        fitted, rows = self._validate(X)
        flocks = dict(zip(fitted.layers_, fitted.engine_.kneighbors(rows), strict=True))
        distances = {layer: -affinity for layer, (affinity, _) in flocks.items()}
        return distances, {layer: index for layer, (_, index) in flocks.items()}

    def respond(self, X: ArrayLike | torch.Tensor, y: None = None) -> ImmuneResponse:
        """Return everything that the responses to some samples produce.

        Parameters
        ----------
        %(X)s
        y : None
            Not used, present by convention.

        Returns
        -------
        ImmuneResponse
            Predictions, plasma and memory cells, curves over the generations, and the threat.
        """
        X = read_in_order(X)  # once, for the scorer too
        fitted, rows = self._validate(X)
        threat, alarms = fitted._ask_scorer(X, len(rows))
        return fitted.engine_.respond(
            rows,
            fitted.classes_,
            alarms=alarms,
            threat=threat,
            n_jobs=fitted.n_jobs,
            verbose=fitted.verbose,
        )

    @restore_on_error
    def remember(
        self,
        response: ImmuneResponse,
        y: ArrayLike | torch.Tensor | None = None,
        *,
        confidence: float = 0.9,
    ) -> Self:
        """Add a response's memory cells to the examples that are flocked.

        Of each sample those cells are kept that are of the predicted class, if the plasma agreed on
        it; or, if its class is given, those that are of this class. Samples that were not bred,
        since their vote was settled, leave nothing to remember: see ``early_stopping``. Wrong
        memories poison: anyone who can send inputs can plant confident wrong predictions, unless
        ``y`` is given.

        Parameters
        ----------
        response : ImmuneResponse
            What :meth:`respond` returned.
        y : array-like of shape (n,), default=None
            The true classes of its samples.
        confidence : float, default=0.9
            Share of the plasma, over all layers, that must be of the predicted class, without
            ``y``. 0 keeps all samples.

        Returns
        -------
        RAILSClassifier
            The estimator itself. Each class has an equal share of ``memory_capacity``; the cells
            that were remembered longest ago are dropped first, and a cell is kept only once.

        Raises
        ------
        TypeError, ValueError
            If the response is none, or one of an estimator with other layers, classes or cells, or
            ``y`` does not fit. Nothing is then remembered.
        """
        fitted = self._as_fitted()
        if y is not None and isinstance(response, ImmuneResponse):
            y = validate_labels(y, len(response.labels))
            check_known_labels(y, self.classes_, "the classes of fit")
        engine = fitted.engine_
        self.engine_ = engine.with_memory(
            select_memories(engine.memory, response, self.classes_, y, confidence)
        )
        return self

    @restore_on_error
    def forget(self) -> Self:
        """Drop all remembered cells.

        Returns
        -------
        RAILSClassifier
            The estimator itself.
        """
        engine = self._as_fitted().engine_
        empty = {layer: bank.emptied() for layer, bank in engine.memory.items()}
        self.engine_ = engine.with_memory(empty)
        return self

    @available_if(_raises_alarms)
    def predict_with_alarm(
        self, X: ArrayLike | torch.Tensor
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Predict classes, and flag samples that may be attacked.

        Only there with a ``threat_scorer`` that has ``predict``.

        Parameters
        ----------
        %(X)s

        Returns
        -------
        labels : ndarray of shape (n,)
            As :meth:`predict` returns them, for flagged samples too.
        alarms : ndarray of shape (n,), bool
            True for samples that the threat scorer flags.
        """
        X = read_in_order(X)  # once, for the scorer too
        fitted, rows = self._validate(X)
        alarms = check_alarms(fitted.threat_scorer_.predict(X), len(rows))
        scores = fitted.engine_.scores(
            rows, alarms=alarms, n_jobs=fitted.n_jobs, verbose=fitted.verbose
        )
        return fitted.classes_[scores.argmax(axis=1)], alarms

    def training_data(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the samples that the classifier was fitted on, and their classes.

        Returns
        -------
        X : ndarray of shape (n, n_features) or (n, *input_shape)
            The samples, in the shape in which ``fit`` got them. Not a copy: do not change them.
        y : ndarray of shape (n,)
            Their classes.
        """
        fitted = self._with({})  # read once
        check_is_fitted(fitted)
        rows = fitted.engine_.layers[0].bank.cells if fitted._rows is None else fitted._rows
        rows = rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows
        return rows.reshape(len(rows), *fitted._given_shape), fitted.classes_[fitted._labels]

    @property
    def neighbors_(self) -> dict[str, ClassNeighbors]:
        """The index of the training data in each layer."""
        return {layer.name: layer.neighbors for layer in self.engine_.layers}

    @property
    def memory_(self) -> dict[str, MemoryBank]:
        """The remembered cells of each layer."""
        return self.engine_.memory

    def _check_parameters(self) -> None:
        for name in ("tau", "delta_min", "delta_max"):
            if isinstance(getattr(self, name), Integral):
                with naming(name):  # an integer may be too large
                    float(getattr(self, name))
        if self.delta_min > self.delta_max:
            raise ValueError(
                f"delta_min={self.delta_min} must not be larger than delta_max={self.delta_max}."
            )
        for name in ("threat_scorer", "gate"):
            if isinstance(getattr(self, name), type):
                given = getattr(self, name).__name__
                raise TypeError(
                    f"{name} must be an estimator, got the class {given}; pass {given}()."
                )
        if getattr(self.gate, "needs_alarms", False) and not hasattr(self.threat_scorer, "predict"):
            raise ValueError(
                f"gate={self.gate!r} needs a threat_scorer that raises alarms, with predict, got "
                f"threat_scorer={self.threat_scorer!r}."
            )

    def _build(
        self,
        X: NDArray[Any] | torch.Tensor,
        y: NDArray[Any],
        given: tuple[Any, Any],
        *,
        extend: bool = False,
    ) -> None:
        """Build the engine from samples; ``given`` are the same as the user has them.

        To ``extend`` means that the samples of the last engine, of the same network, come first.
        """
        n_classes, size = len(self.classes_), self.population_size
        size = max(DEFAULT_POPULATION_SIZE, n_classes) if size == "auto" else int(size)
        for name, value in (("population_size", size), ("memory_capacity", self.memory_capacity)):
            if value < n_classes:
                raise ValueError(
                    f"{name}={value} is smaller than the number of classes, {n_classes}; every "
                    f"class needs a cell, so use {n_classes} or more."
                )
        if self._features.integer_input and self.start_layer is None:
            raise ValueError(
                "start_layer=None lets populations live in the input, but the network takes "
                "integers there, which cannot be mutated. Set start_layer to a layer behind the "
                "embedding, and layers to one that comes after it."
            )
        # What may still fail must not cost the old index, but two do not fit into memory.
        if hasattr(self._original, "engine_"):
            self._original.engine_ = self._original.engine_.on_disk()
            self.__dict__.pop("engine_", None)
        self._features.learn_range(X)
        self._labels = np.searchsorted(self.classes_, y)
        self._rows = None if self.start_layer is None else X  # else the samples are the cells
        self.engine_ = build_engine(
            self._features,
            X,
            self._labels,
            n_classes=n_classes,
            n_neighbors=int(self.n_neighbors),
            schedule=Schedule(
                population_size=size,
                generations=int(self.generations),
                selection=self.selection,
                crossover=self.crossover,
                n_plasma=top_count(self.plasma_fraction, size),
                n_memory=top_count(self.memory_fraction, size),
                early_stopping=self.early_stopping,
                compile=self.compile,
            ),
            mutation=Mutation(self.rho, self.delta_min, self.delta_max),
            tau=self.tau,
            clip=self.clip,
            affinity=self.affinity,
            algorithm=self.algorithm,
            memory_capacity=int(self.memory_capacity),
            gate=self.gate,
            seed=self.seed_,
            n_jobs=self.n_jobs,
            verbose=self.verbose,
            previous=self._original.engine_ if extend else None,
        )
        self.tau_ = {layer.name: layer.tau for layer in self.engine_.layers}
        sizes = self.engine_.layers[0].neighbors.n_samples_
        self.n_neighbors_ = np.array([min(self.n_neighbors, n) for n in sizes])
        self.__dict__.pop("threat_scorer_", None)
        if self.threat_scorer is not None:
            scorer: Any = clone(self.threat_scorer)
            if isinstance(scorer, ThreatScorer):
                fill_open_parameters(scorer, self)
                if scorer.random_state is None:
                    scorer.random_state = self.seed_
                scorer._outer = OuterIndexes(self._features, self._labels, self.neighbors_)
            self.threat_scorer_ = scorer.fit(*given)
            if isinstance(scorer, ThreatScorer):
                del scorer._outer

    def _scores(self, X: ArrayLike | torch.Tensor) -> tuple[Self, NDArray[np.float64]]:
        """Return the estimator as it was fitted, and the scores of checked samples."""
        fitted = self._as_fitted()
        needs_alarms = getattr(fitted.engine_.gate, "needs_alarms", False)
        if needs_alarms:
            X = read_in_order(X)  # once, for the scorer too
        rows = validate_rows(fitted, X)
        alarms = None
        if needs_alarms:
            alarms = check_alarms(fitted.threat_scorer_.predict(X), len(rows))
        return fitted, fitted.engine_.scores(
            rows, alarms=alarms, n_jobs=fitted.n_jobs, verbose=fitted.verbose
        )

    def _ask_scorer(
        self, X: ArrayLike | torch.Tensor, n_samples: int
    ) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_] | None]:
        """Return the threat scores, and the alarms where the gate needs them."""
        scorer = getattr(self, "threat_scorer_", None)
        if scorer is None:
            return None, None
        scores = check_threat_scores(scorer.score_samples(X), n_samples)
        if not getattr(self.engine_.gate, "needs_alarms", False):
            return -scores, None
        if hasattr(scorer, "offset_"):  # as predict does, without asking again
            return -scores, scores - scorer.offset_ < 0
        return -scores, check_alarms(scorer.predict(X), n_samples)
