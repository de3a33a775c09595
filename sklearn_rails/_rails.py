"""The RAILS classifier: the paper's five steps, each one call."""

import functools
import math
import os
import warnings
from dataclasses import replace
from numbers import Integral, Real
from typing import Self

import numpy as np
import torch
from joblib import Parallel, delayed, effective_n_jobs
from joblib.parallel import get_active_backend
from numpy.typing import ArrayLike
from sklearn.base import ClassifierMixin, clone
from tqdm.auto import tqdm

from ._base import (
    LARGEST_SIZE,
    NEIGHBORS_ARE_STALE,
    NETWORK_CONSTRAINTS,
    NetworkEstimator,
    as_fitted,
    prepare_fit,
    restore_on_error,
    validate_rows,
)
from ._blocks import block_slices, map_blocks, memory_budget
from ._compat import HasMethods, Interval, StrOptions, fit_context
from ._remembering import Remembers
from ._settling import SettlesRows, check_threat_scores, shares_of, spread_rows
from ._validation import check_known_labels
from .features import is_out_of_memory
from .immune.consensus import class_affinity, count_votes, rank_by_affinity, tie_break, top_count
from .immune.maturation import (
    Schedule,
    check_alive,
    clone_neighbors,
    find_domain,
    mature,
    mutation_steps,
)
from .immune.random import draw_seed, generation_uniforms
from .immune.response import LAYER_FIELDS, ImmuneResponse, join_responses
from .neighbors.affinity import affinity_to
from .neighbors.index import ClassNeighbors, merge_flocks, scale_of_affinity

# Random numbers for so many elements of cells are kept for the next block of rows.
CACHED_NUMBERS = 8 * 2**20

# Training rows that tell the scale of tau.
TAU_ROWS = 256

# Arrays of the populations' size that a generation holds at a time.
POPULATIONS_HELD = 6

# On a CPU populations of so many bytes are bred in a block, to be still in a cache for the next
# generation.
CPU_BYTES = 32 * 2**20


class RAILSClassifier(Remembers, SettlesRows, ClassifierMixin, NetworkEstimator):
    """Robust predictions from a fitted network by affinity maturation (RAILS).

    For each input, the nearest training examples of every class in a hidden layer are cloned into
    a population, which a genetic algorithm breeds toward the input; the offspring of highest
    affinity vote. The network is not retrained: it gives the space in which affinity is measured.

    Parameters
    ----------
    feature_extractor : None, torch.nn.Module, fitted skorch net, FrozenModule or \
            TorchFeatureExtractor, default=None
        The fitted network. None takes the input itself as the only layer.
    layers : str or sequence of str, default=None
        Hidden layers, as in ``module.named_modules()``; each has a population of its own, and all
        of them vote. None takes the extractor's own layers, else the network's output.
    n_neighbors : int, default=10
        Neighbours of each class that are flocked in a layer (k). Clipped where a class has fewer
        training examples.
    population_size : int, default=150
        Cells in a population (T), shared equally by the classes in the beginning.
    generations : int, default=3
        Generations to breed (G), at most. Accuracy under attack rises for two or three and then
        stays or falls: a population that can match anything matches the perturbation too.
    tau : float or "scale", default="scale"
        Temperature of selection, in units of the affinity. ``"scale"`` takes, in each layer, a
        fifth of the median spread (standard deviation) of the affinities between a training
        example and its flocked neighbours.
    rho : float, default=0.15
        Probability that mutation changes an element.
    delta_min, delta_max : float, default=0.05 and 0.15
        Smallest and largest size of a mutation. Where the cells' space is not within [0, 1], in
        units of each feature's range over the training data.
    plasma_fraction, memory_fraction : float, default=0.05 and 0.25
        Share of the final population, by affinity, that votes, and that is kept as memory.
    memory_capacity : int, default=1000
        Cells that are remembered in each layer at most, in equal shares of the classes; see
        :meth:`remember`.
    affinity : {"euclidean", "cosine", "inner_product"} or callable, default="euclidean"
        Minus the distance of features, their cosine, or their inner product. A callable takes two
        tensors of shape (n, n_layer_features) and gives one of shape (n,), higher for closer.
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
    arbitration : float, default=None
        Between 0 and 1: the network's own label stands, and no population is bred, unless its
        p-value, by the flocked neighbours, is this or less. That is about the share of clean rows
        that are put to the vote. None puts every row to the vote, as the paper does.
    early_stopping : bool, default=True
        Let a row be once its plasma has been of one and the same class in two generations in a
        row. False breeds all generations.
    algorithm : {"auto", "brute", "kd_tree", "ball_tree"} or estimator, default="auto"
        How neighbours are found: an exact matrix product on the device, scikit-learn's
        :class:`~sklearn.neighbors.NearestNeighbors`, or an estimator with ``kneighbors`` that is
        cloned for every class. The last two need a distance: Euclidean or cosine affinity.
    storage : {"memory", "float16"} or path, default="memory"
        Where the training data's features are kept, if ``algorithm="auto"``. ``"float16"`` needs
        half the memory: neighbours are found in half precision, and those among which it cannot
        decide are computed anew from the training data and compared in full. A folder takes them
        into a temporary file that is mapped into memory; it goes with the estimator. The neighbours
        are the same.
    input_shape : tuple of int, default=None
        Shape of one input, such as ``(1, 28, 28)``, when X has two dimensions. None takes X's own
        shape.
    threat_scorer : estimator, default=None
        An outlier detector with ``score_samples``, such as
        :class:`~sklearn_rails.ThreatScorer`. A clone is fitted to the training data, and its
        scores go into the responses. It changes no prediction, but with ``triage``.
    triage : bool, default=False
        Breed only what the ``threat_scorer`` raises an alarm on. The fittest of the flocked
        neighbours, as many as there would be plasma cells, vote on all other rows. Whoever evades
        the scorer is then answered by nearest neighbours. Not together with ``arbitration``.
    device : str, default="auto"
        ``"cpu"``, ``"cuda"``, ``"cuda:<index>"`` or ``"mps"``; ``"auto"`` is CUDA where there is a
        GPU, else the CPU.
    dtype : {"float32", "float64"}, default="float32"
        Precision of the network, the features and the cells.
    batch_size : int or "auto", default="auto"
        Rows that go through the network together.
    n_jobs : int, default=None
        Blocks of rows that are answered side by side, in threads, and threads for neighbours.
    random_state : int, RandomState or None, default=None
        Decides on the seed that ``fit`` draws. Predictions are a function of the fitted state and
        the row, however often and in whatever company it is asked for.
    verbose : int, default=0
        1 shows a progress bar over the rows, with the share of their populations that is decided.

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
    tau_ : dict of str to float
        The temperature in each layer.
    n_neighbors_ : ndarray of shape (n_classes,)
        Neighbours that are flocked in each class.
    neighbors_ : dict of str to ClassNeighbors
        The neighbour structure of each layer, of the training data.
    memory_ : dict of str to MemoryBank
        What is remembered in each layer: ``cells`` and their ``labels``, positions in ``classes_``.
    seed_ : int
        What the random numbers are a function of, with the layer and the generation.
    device_ : torch.device
        Where the computation runs.
    threat_scorer_ : estimator
        The fitted threat scorer, if there is one.

    See Also
    --------
    DkNNClassifier : The baseline: a vote of neighbours in hidden layers, with its credibility.
    ThreatScorer : How suspect an input is.

    Notes
    -----
    The algorithm is Algorithm 1 of [1]_. The paper leaves open how affinity decides on the
    cross-over; here the fitter parent gives more (see ``crossover``). Predictions on the training
    rows see the rows themselves among their neighbours.

    Arbitration is not in the paper; its p-values are conformal, as those of deep k-nearest
    neighbours [2]_. The nonconformity of a label is by how much the flock of another class is
    nearer than the flock of its own, in units of tau, summed over the layers. It is compared with
    that of 1,000 training rows, each left out of its own neighbours, for the labels that the
    network gives them. The network's outputs must be in the order of ``classes_``.

    References
    ----------
    .. [1] R. Wang, T. Chen, S. Lindsly, C. Stansbury, I. Rajapakse, A. Hero, "Immuno-mimetic Deep
       Neural Networks (Immuno-Net)", 2021, arXiv:2107.02842.
    .. [2] N. Papernot, P. McDaniel, "Deep k-Nearest Neighbors: Towards Confident, Interpretable
       and Robust Deep Learning", 2018, arXiv:1803.04765.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import RAILSClassifier
    >>> X, y = load_digits(return_X_y=True)
    >>> X = X / 16
    >>> rails = RAILSClassifier(population_size=100, random_state=0).fit(X[:1000], y[:1000])
    >>> rails.score(X[1000:1050], y[1000:1050]) > 0.9
    True
    """

    _parameter_constraints = {
        "feature_extractor": "no_validation",
        **NETWORK_CONSTRAINTS,
        "n_neighbors": [Interval(Integral, 1, None, closed="left")],
        "population_size": [Interval(Integral, 1, LARGEST_SIZE, closed="both")],
        "generations": [Interval(Integral, 0, LARGEST_SIZE, closed="both")],
        "tau": [StrOptions({"scale"}), Interval(Real, 0, None, closed="neither")],
        "rho": [Interval(Real, 0, 1, closed="both")],
        "delta_min": [Interval(Real, 0, None, closed="left")],
        "delta_max": [Interval(Real, 0, None, closed="left")],
        "plasma_fraction": [Interval(Real, 0, 1, closed="right")],
        "memory_fraction": [Interval(Real, 0, 1, closed="right")],
        "memory_capacity": [Interval(Integral, 1, None, closed="left")],
        "affinity": [StrOptions({"euclidean", "cosine", "inner_product"}), callable],
        "selection": [StrOptions({"global", "class_balanced"})],
        "crossover": [StrOptions({"affinity", "uniform"})],
        "start_layer": [None, str],
        "clip": [StrOptions({"auto"}), None, "array-like"],
        "arbitration": [None, Interval(Real, 0, 1, closed="neither")],
        "early_stopping": ["boolean"],
        "algorithm": [
            StrOptions({"auto", "brute", "kd_tree", "ball_tree"}),
            HasMethods(["fit", "kneighbors"]),
        ],
        "storage": [StrOptions({"memory", "float16"}), str, os.PathLike],
        "threat_scorer": [None, HasMethods(["fit", "score_samples"])],
        "triage": ["boolean"],
        "n_jobs": [None, Interval(Integral, -LARGEST_SIZE, LARGEST_SIZE, closed="both")],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
    }

    def __init__(
        self,
        feature_extractor=None,
        *,
        layers=None,
        n_neighbors=10,
        population_size=150,
        generations=3,
        tau="scale",
        rho=0.15,
        delta_min=0.05,
        delta_max=0.15,
        plasma_fraction=0.05,
        memory_fraction=0.25,
        memory_capacity=1000,
        affinity="euclidean",
        selection="global",
        crossover="affinity",
        start_layer=None,
        clip="auto",
        arbitration=None,
        early_stopping=True,
        algorithm="auto",
        storage="memory",
        input_shape=None,
        threat_scorer=None,
        triage=False,
        device="auto",
        dtype="float32",
        batch_size="auto",
        n_jobs=None,
        random_state=None,
        verbose=0,
    ):
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
        self.arbitration = arbitration
        self.early_stopping = early_stopping
        self.algorithm = algorithm
        self.storage = storage
        self.input_shape = input_shape
        self.threat_scorer = threat_scorer
        self.triage = triage
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    @restore_on_error
    @fit_context(prefer_skip_nested_validation=False)
    def fit(self, X: ArrayLike | torch.Tensor, y: ArrayLike | torch.Tensor) -> Self:
        """Index the training data's features, class by class.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Training inputs, finite.
        y : array-like of shape (n,)
            Their classes.

        Returns
        -------
        RAILSClassifier
            The estimator itself.

        Raises
        ------
        TypeError, ValueError
            If a parameter or the data is invalid, the network does not fit the data, or a layer or
            the device is not there. The estimator is then as it was before.
        """
        given = X, y
        if self.delta_min > self.delta_max:
            raise ValueError(
                f"delta_min={self.delta_min} must not be larger than delta_max={self.delta_max}."
            )
        if isinstance(self.threat_scorer, type):
            raise TypeError(
                f"threat_scorer must be an estimator, got the class {self.threat_scorer.__name__}; "
                f"pass {self.threat_scorer.__name__}()."
            )
        if self.triage:
            self._check_triage()
        X, y = prepare_fit(
            self,
            X,
            y,
            network=self.feature_extractor,
            start_layer=self.start_layer,
            with_output=self.arbitration is not None,
        )
        named = vars(self).pop("_named_classes", None)  # by partial_fit
        self._classes_are_named = named is not None
        self.classes_ = np.unique(y if named is None else named)
        check_known_labels(y, self.classes_, "classes")
        self.seed_ = draw_seed(self.random_state)
        # As a threat scorer gets more samples in partial_fit.
        is_flat = len(self.input_shape_) == 1 or getattr(given[0], "ndim", 0) == 2
        self._given_shape = (self.n_features_in_,) if is_flat else self.input_shape_
        self._learn(X, y, given)
        return self._forget()

    def _learn(self, X, y, given):
        """Index samples; ``given`` are the same as the user has them."""
        y = np.searchsorted(self.classes_, y)
        self._check_sizes()
        if self._features.integer_input and self.start_layer is None:
            raise ValueError(
                "start_layer=None lets populations live in the input, but the network takes "
                "integers there, which cannot be mutated. Set start_layer to a layer behind the "
                "embedding, and layers to one that comes after it."
            )
        if self.arbitration is not None:
            self._check_outputs(X)
        for layer in self.layers_:
            self._features.choose_layout(layer, **self._comparison())
        self._features.learn_range(X)
        self._draws = {}
        self._y = y
        vars(self).pop("_rows", None)
        if self.start_layer is not None:  # else the samples are the cells
            self._rows = X
        self._cells = self._features.embed_cells(X)
        self._domain = find_domain(self._cells, self.clip)
        self._index_samples(X)
        if self.tau == "scale":
            self.tau_ = self._scale_tau(X)
        else:
            self.tau_ = dict.fromkeys(self.layers_, float(self.tau))
        vars(self).pop("_calibration", None)
        if self.arbitration is not None:
            self._calibration = self._judge_training_rows(X)
        vars(self).pop("threat_scorer_", None)
        if self.threat_scorer is not None:
            self.threat_scorer_ = clone(self.threat_scorer).fit(*given)

    def _check_sizes(self):
        n_classes = len(self.classes_)
        for name, part in (("population_size", "a cell"), ("memory_capacity", "room for a cell")):
            if getattr(self, name) < n_classes:
                raise ValueError(
                    f"{name}={getattr(self, name)} is smaller than the number of classes, "
                    f"{n_classes}; every class needs {part}, so use {n_classes} or more."
                )

    def _index_samples(self, X):
        # What may still fail must not cost the old index, but two do not fit into memory.
        for layer, neighbors in getattr(self, "neighbors_", {}).items():
            self._original.neighbors_[layer] = neighbors.on_disk()
        self.neighbors_ = {}
        for layer in self.layers_:
            neighbors = ClassNeighbors(self.affinity, self.algorithm, self.n_jobs, self.storage)
            self.neighbors_[layer] = neighbors.begin(self._y, len(self.classes_))
        for rows in block_slices(len(X), self._features.row_bytes, self._features.device):
            for layer, features in self._features(X[rows]).items():
                self.neighbors_[layer].put(rows, features)
        self.n_neighbors_ = np.array([min(self.n_neighbors, n) for n in neighbors.n_samples_])
        for neighbors in self.neighbors_.values():
            neighbors.finish()

    def predict(self, X: ArrayLike | torch.Tensor) -> np.ndarray:
        """Predict classes.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n,)
            The class with the highest score.
        """
        fitted = self._as_fitted()
        return fitted.classes_[fitted._scores(X).argmax(axis=1)]

    def predict_proba(self, X: ArrayLike | torch.Tensor) -> np.ndarray:
        """Give the classes' shares of the plasma's votes, ties broken.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            The scores of ``decision_function``, class by class, over their sum.
        """
        return shares_of(self._as_fitted()._scores(X))

    def decision_function(self, X: ArrayLike | torch.Tensor) -> np.ndarray:
        """Give the classes' votes, and less than a vote for their affinity.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        ndarray of shape (n, n_classes), or (n,) for two classes, float64
            Plasma cells of all layers that are of the class, plus at most half a vote that grows
            with the highest affinity in the class. For two classes the difference, positive for
            ``classes_[1]``. With ``arbitration``, a network's label that stands has all votes.
        """
        scores = self._as_fitted()._scores(X)
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def kneighbors(
        self, X: ArrayLike | torch.Tensor
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Find the flocked neighbours: the training examples that a response sets out from.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.

        Returns
        -------
        distances : dict of str to ndarray of shape (n, n_classes, n_neighbors)
            Minus the affinity, in each layer, smallest first; for the Euclidean affinity the
            distance. Infinite where a class has no more examples.
        indices : dict of str to ndarray of shape (n, n_classes, n_neighbors)
            Positions in the training data, and after its end in ``memory_[layer].cells``; -1 where
            a class has no more examples.
        """
        fitted = self._as_fitted()
        X = validate_rows(fitted, X)

        def flock(block):
            found = []
            for layer, features in fitted._features(X[block]).items():
                affinity, index = fitted._flock(features, layer)
                found += [-affinity.cpu().numpy(), index.cpu().numpy()]
            return found

        found = map_blocks(flock, len(X), fitted._features.row_bytes, fitted._features.device)
        distances = dict(zip(fitted.layers_, found[::2], strict=True))
        indices = dict(zip(fitted.layers_, found[1::2], strict=True))
        return distances, indices

    def respond(self, X: ArrayLike | torch.Tensor, y: None = None) -> ImmuneResponse:
        """Give everything that the responses to some rows produce.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Inputs.
        y : None
            Not used, present by convention.

        Returns
        -------
        ImmuneResponse
            Predictions, plasma and memory cells, curves over the generations, and the threat.
        """
        return self._as_fitted()._respond(X)

    def _respond(self, X):
        rows = validate_rows(self, X)
        response = join_responses(self._answer(rows, self._respond_block))
        if self.arbitration is not None or self.triage:
            scores, bred, p_values = self._settle(rows, X)
            proba = np.where(bred[:, None], response.proba, shares_of(scores))
            labels = self.classes_[proba.argmax(axis=1)]
            response = replace(response, proba=proba, labels=labels, p_values=p_values)
        if not hasattr(self, "threat_scorer_"):
            return response
        scores = check_threat_scores(self.threat_scorer_.score_samples(X), len(rows))
        return replace(response, threat=-scores)

    def _as_fitted(self):
        return as_fitted(self, consequence=NEIGHBORS_ARE_STALE)

    def _scores(self, X):
        rows = validate_rows(self, X)
        if self.arbitration is None and not self.triage:
            return np.concatenate(self._answer(rows, self._score_block))
        scores, bred, _ = self._settle(rows, X)
        bred = np.flatnonzero(bred)
        if len(bred):
            scores[bred] = np.concatenate(self._answer(rows[bred], self._score_block))
        return scores

    def _answer(self, X, answer_block):
        """Answer blocks of rows whose populations fit into memory."""
        n_threads = effective_n_jobs(self.n_jobs)
        backend, _ = get_active_backend(prefer="threads")
        if n_threads > 1 and not getattr(backend, "supports_sharedmem", False):
            self._features.warn_once(
                "backend",
                "n_jobs runs threads of this process, which share the network and the neighbours: "
                f"the joblib backend {type(backend).__name__} is not used. To predict on several "
                "machines, send the fitted estimator and parts of X to its workers.",
            )
        bank = self._cells
        row_bytes = self.population_size * bank[0].nbytes
        block_bytes = memory_budget(bank.device) // (POPULATIONS_HELD * n_threads)
        if bank.device.type == "cpu":
            block_bytes = min(block_bytes, CPU_BYTES)
        step = max(1, int(block_bytes // row_bytes))
        step = min(step, -(-len(X) // n_threads))
        n_decided = 0
        with tqdm(total=len(X), unit="row", disable=not self.verbose) as progress:

            def on_decided(n_populations):
                nonlocal n_decided
                n_decided += n_populations
                share = n_decided / (len(X) * len(self.layers_))
                progress.set_postfix_str(f"{share:.0%} of populations decided")

            def answer(rows):
                try:
                    given = [answer_block(rows, on_decided)]
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if len(rows) == 1:
                        raise MemoryError(
                            f"The population of a single sample does not fit into the memory of "
                            f"{bank.device}: {error} Use a smaller population_size, fewer "
                            "generations, a start_layer with fewer features, or device='cpu'."
                        ) from error
                    half = len(rows) // 2
                    return answer(rows[:half]) + answer(rows[half:])
                progress.update(len(rows))
                return given

            answers = Parallel(n_jobs=self.n_jobs, require="sharedmem")(
                delayed(answer)(X[start : start + step]) for start in range(0, len(X), step)
            )
        return [block for blocks in answers for block in blocks]

    def _score_block(self, X, on_decided):
        votes, ties = 0, 0
        for layer, flocked, population in self._mature(X, on_decided, keep_cells=False):
            layer_votes, layer_ties, _ = self._vote(layer, flocked, population)
            votes, ties = votes + layer_votes, ties + layer_ties
        return self._join_votes(votes, ties)

    def _respond_block(self, X, on_decided):
        votes, ties = 0, 0
        by_layer = {name: {} for name in LAYER_FIELDS}
        n_forward = 0
        for layer, flocked, population in self._mature(X, on_decided, keep_cells=True):
            layer_votes, layer_ties, ranking = self._vote(layer, flocked, population)
            votes, ties = votes + layer_votes, ties + layer_ties
            n_forward += self.population_size * int((population.n_generations + 1).sum())
            for kind, fraction in (
                ("plasma", self.plasma_fraction),
                ("memory", self.memory_fraction),
            ):
                best = ranking[:, : top_count(fraction, self.population_size)]
                cells = population.cells[torch.arange(len(best), device=best.device)[:, None], best]
                labels = population.labels.gather(1, best).cpu().numpy()
                by_layer[kind][layer] = cells.unflatten(2, self._features.cell_shape).cpu().numpy()
                by_layer[f"{kind}_labels"][layer] = self.classes_[labels]
                by_layer[f"{kind}_affinity"][layer] = (
                    population.affinity.gather(1, best).cpu().numpy()
                )
            for curve in ("affinity_curve", "class_curve", "n_generations"):
                by_layer[curve][layer] = getattr(population, curve).cpu().numpy()
        scores = self._join_votes(votes, ties)
        return ImmuneResponse(
            proba=shares_of(scores),
            labels=self.classes_[scores.argmax(axis=1)],
            n_forward=n_forward,
            p_values=None,
            threat=None,
            **by_layer,
        )

    def _mature(self, X, on_decided, *, keep_cells):
        """Flock, expand and optimize, one layer after the other."""
        schedule = Schedule(
            generations=self.generations,
            selection=self.selection,
            crossover=self.crossover,
            n_plasma=top_count(self.plasma_fraction, self.population_size),
            early_stopping=self.early_stopping,
        )
        bank = self._cells
        domain = self._domain.on(bank)
        for number, (layer, antigens) in enumerate(self._features(X).items()):
            flocked, index = self._flock(antigens, layer)
            parents, labels = clone_neighbors(index, self.population_size)
            population = mature(
                self._find_cells(parents, layer),
                labels,
                measure=self._measure_against(antigens, layer),
                draw=self._draw_for(number, domain),
                tau=self.tau_[layer],
                schedule=schedule,
                domain=domain,
                n_classes=len(self.classes_),
                keep_cells=keep_cells,
                on_decided=on_decided,
            )
            check_alive(population, layer)
            yield layer, flocked, population

    def _scale_tau(self, X):
        own = spread_rows(X, TAU_ROWS)
        return {
            layer: scale_of_affinity(
                self.neighbors_[layer],
                own.to(self.device_),
                features,
                self.n_neighbors,
                self._recall(layer),
            )
            for layer, features in self._features(X[own.tolist()]).items()
        }

    def _flock(self, features, layer):
        k = int(self.n_neighbors_.max())
        if layer not in self._remembered:
            return self.neighbors_[layer].kneighbors(features, k, self._recall(layer))
        # Remembered cells count towards k where a class has fewer samples.
        neighbors, remembered = self.neighbors_[layer], self._remembered[layer]
        k = min(self.n_neighbors, int((neighbors.n_samples_ + remembered.n_samples_).max()))
        flock = neighbors.kneighbors(features, k, self._recall(layer))
        affinity, index = remembered.kneighbors(features, k)
        index = torch.where(index < 0, index, index + len(self._y))
        return merge_flocks(flock, (affinity, index), k)

    def _recall(self, layer):
        """Give what computes training features anew, if they are not kept in full precision."""
        if self.storage != "float16":
            return None
        return lambda index: self._features.features_of_cells(self._cells[index], layer)

    def _comparison(self):
        return {
            "compare": functools.partial(affinity_to, self.affinity),
            "any_order": not callable(self.affinity),
        }

    def _measure_against(self, antigens, layer):
        def measure(cells, rows):
            present = antigens.index_select(0, rows)
            return self._features.affinities(cells, layer, present, **self._comparison())

        return measure

    def _draw_for(self, number, domain):
        bank = self._cells
        shape = self.population_size, bank.shape[1]
        mutation = self.rho, self.delta_min, self.delta_max
        key = number, shape, mutation, bank.device

        # All rows of all calls use the same numbers.
        @functools.lru_cache(max(1, CACHED_NUMBERS // math.prod(shape)))
        def draw(generation):
            uniforms = generation_uniforms(self.seed_, number, generation, *shape)
            drawn = {k: u.to(device=bank.device, dtype=bank.dtype) for k, u in uniforms.items()}
            drawn["steps"] = mutation_steps(drawn.pop("mutate"), *mutation, domain.unit)
            return drawn

        # In place, since predicting must not change an estimator's attributes.
        for other in list(self._draws):
            if other[1:] != key[1:]:
                self._draws.pop(other, None)
        return self._draws.setdefault(key, draw)

    def _vote(self, layer, flocked, population):
        ranking = rank_by_affinity(population.affinity, self.population_size)
        plasma = ranking[:, : top_count(self.plasma_fraction, self.population_size)]
        votes = count_votes(population.labels.gather(1, plasma), len(self.classes_))
        best = class_affinity(population.affinity, population.labels, flocked)
        return votes, tie_break(best, self.tau_[layer]), ranking

    def _join_votes(self, votes, ties):
        return (votes + ties / len(self.layers_)).cpu().numpy()

    def __getstate__(self):
        state = super().__getstate__()
        if "_cells" in state:
            # Plain arrays load where there is no GPU, and joblib can map them from disk.
            state |= {"_cells": state["_cells"].cpu().numpy(), "_draws": {}}
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if "_cells" in state:
            with warnings.catch_warnings():
                # Cells that are mapped from disk stay there; torch warns that they are read-only.
                warnings.simplefilter("ignore", UserWarning)
                cells = torch.from_numpy(np.asarray(state["_cells"]))
            self._cells = cells.to(self._features.device)
