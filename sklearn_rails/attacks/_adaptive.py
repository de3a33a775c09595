"""An attack on neighbours and populations, not on the network."""

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch.nn.functional import normalize, one_hot, pad
from tqdm.auto import tqdm

from .._dknn import DkNNClassifier
from .._rails import RAILSClassifier
from .._random import draw_seed
from .._threat import ThreatScorer
from .._validation import validate_rows
from ..immune.affinity import affinity_to
from ..immune.consensus import fittest
from ..immune.flocking import ClassNeighbors

# Where the restarts set out from, in turn.
STARTS = ("here", "toward another class", "anywhere", "anywhere", "anywhere")

# A lead of the network's logits beyond this is of no use to an attacker.
LOGIT_LEAD = 5

# References' features that are compared at a time.
BLOCK_BYTES = 128 * 2**20


class AdaptiveKNNAttack:
    r"""Attack a DkNN or RAILS classifier itself, by gradients of a soft k-NN margin.

    Attacks on the bare network say nothing about an attacker who knows the defence. This one
    differentiates through the layers that the defence looks at. In each of them a class scores
    the softened nearness of its references,

    .. math:: s_c = \log \sum_{i \in R_c} \exp(A(f(x'), f(r_i)) / T),

    and the attack climbs the sum over the layers of :math:`\max_{c \ne y} s_c - s_y` (in every
    second pair of restarts of the cross-entropy of the scores) by signed steps in an L-infinity
    ball. The references are the nearest training rows of each class; for RAILS they are each
    class's fittest cells of real responses to :math:`x'`, under several seeds. They are renewed
    every few steps, and constants in between.

    Where RAILS arbitrates, the network must be fooled as well, and toward the same class: in every
    second restart its logits are added to the scores. With a ``threat_weight`` the attack also
    keeps away from alarms: it descends that multiple of a softened threat score, for which the same
    :math:`s_c` are taken in the layers of the threat scorer, and only answers that are wrong and
    raise no alarm count.

    Parameters
    ----------
    estimator : fitted DkNNClassifier or RAILSClassifier
        What is attacked. With ``DkNNClassifier(n_neighbors=k, calibration="leave-one-out")`` and no
        network that is the k nearest neighbours of the input itself.
    X_train : array-like of shape (n_train, n_features) or (n_train, *input_shape)
        The rows that it was fitted on.
    y_train : array-like of shape (n_train,)
        Their classes.
    eps : float
        Radius of the ball.
    step : float, default=None
        Size of a step. None takes an eighth of ``eps``.
    max_iter : int, default=100
        Steps of each restart.
    n_restarts : int, default=5
        Restarts: from the row itself, from the side of the ball that is toward the nearest
        training row of another class, and then from anywhere in the ball.
    n_references : int, default=10
        References of each class in each layer.
    refresh : int, default=10
        Steps after which references are renewed and success is looked for.
    n_seeds : int, default=3
        Seeds under which RAILS's cells are bred for the attack.
    n_checks : int, default=5
        Seeds that the attack has not seen, by whose majority it judges whether RAILS is wrong.
    threat_weight : float, default=0
        Weight of the threat score of RAILS's ``threat_scorer``, which must be a
        :class:`~sklearn_rails.ThreatScorer`. 0 ignores alarms.
    clip : pair of float or None, default=(0, 1)
        Bounds of the inputs.
    random_state : int, RandomState or None, default=None
        Decides on starts and seeds.
    verbose : int, default=0
        1 shows a progress bar over the rows of all restarts.

    Raises
    ------
    TypeError
        If the estimator, or its threat scorer, is of another kind.
    ValueError
        If a number is out of range, or the training rows do not fit the estimator.

    Notes
    -----
    A row for which the attack fails may still fall to another one: the accuracy that is left is an
    upper bound of the robust accuracy. Report, for each row, the worst over all attacks, and see
    :func:`~sklearn_rails.metrics.robust_accuracy_score`.

    References
    ----------
    .. [1] C. Sitawarin, D. Wagner, "Minimum-Norm Adversarial Examples on KNN and KNN-Based Models",
       2020, arXiv:2003.06559.
    .. [2] R. Wang, T. Chen, P. Yao, S. Liu, I. Rajapakse, A. Hero, "ASK: Adversarial Soft k-Nearest
       Neighbor Attack and Defense", 2021, arXiv:2106.14300.
    .. [3] A. Athalye, N. Carlini, D. Wagner, "Obfuscated Gradients Give a False Sense of Security",
       ICML 2018, arXiv:1802.00420 (expectation over the defence's randomness).

    Examples
    --------
    >>> from sklearn_rails import DkNNClassifier
    >>> from sklearn_rails.attacks import AdaptiveKNNAttack
    >>> from sklearn_rails.datasets import load_digit_images
    >>> digits = load_digit_images()
    >>> X, y = digits.X_train, digits.y_train
    >>> dknn = DkNNClassifier(n_neighbors=5, calibration="leave-one-out").fit(X, y)
    >>> attack = AdaptiveKNNAttack(dknn, X, y, eps=0.3, max_iter=20, n_restarts=2, random_state=0)
    >>> X_test, y_test = digits.X_test[:20], digits.y_test[:20]
    >>> dknn.score(attack.generate(X_test, y_test), y_test) < dknn.score(X_test, y_test)
    True
    """

    def __init__(
        self,
        estimator,
        X_train,
        y_train,
        *,
        eps,
        step=None,
        max_iter=100,
        n_restarts=5,
        n_references=10,
        refresh=10,
        n_seeds=3,
        n_checks=5,
        threat_weight=0,
        clip=(0, 1),
        random_state=None,
        verbose=0,
    ):
        if not isinstance(estimator, DkNNClassifier | RAILSClassifier):
            raise TypeError(
                "estimator must be a fitted DkNNClassifier or RAILSClassifier, got "
                f"{type(estimator).__name__}."
            )
        check_is_fitted(estimator)
        for name, value, low in (
            ("eps", eps, 0),
            ("step", eps if step is None else step, 0),
            ("max_iter", max_iter, 1),
            ("n_restarts", n_restarts, 1),
            ("n_references", n_references, 1),
            ("refresh", refresh, 1),
            ("n_seeds", n_seeds, 1),
            ("n_checks", n_checks, 1),
            ("threat_weight", threat_weight, 0),
        ):
            if not value >= low:
                raise ValueError(f"{name} must be {low} or more, got {value!r}.")
        self.estimator = estimator
        self.eps = eps
        self.step = eps / 8 if step is None else step
        self.max_iter = max_iter
        self.n_restarts = n_restarts
        self.refresh = refresh
        self.threat_weight = threat_weight
        self.clip = clip
        self.verbose = verbose
        self._rng = check_random_state(random_state)
        train, labels = self._check(X_train, y_train, "X_train")
        n_classes = len(estimator.classes_)
        self._train = estimator._features.to_device(train)
        self._inputs = ClassNeighbors().fit(self._train, labels, n_classes)
        if isinstance(estimator, RAILSClassifier):
            self._defence = _Populations(estimator, n_references, n_seeds, n_checks, self._rng)
        else:
            self._defence = _Neighbors(estimator, train, labels, n_references)
        self._threat = None
        if threat_weight > 0:
            self._threat = _Threat(estimator, train, labels, n_references)

    def generate(self, X, y):
        """Look for wrong answers within the balls around some rows.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            The rows.
        y : array-like of shape (n,)
            Their true classes.

        Returns
        -------
        ndarray of the shape of ``X``, in the estimator's dtype
            A point that is answered wrongly (and raises no alarm, with a ``threat_weight``), where
            one was found; the other rows, and those that are so as they are, come back as they
            were.

        Raises
        ------
        ValueError
            If the rows do not fit the estimator, or there are classes that it does not know.
        """
        rows, labels = self._check(X, y, "X")
        rows = self.estimator._features.to_device(rows)
        labels = torch.as_tensor(labels, device=rows.device)
        found = rows.clone()
        standing = (~self._is_fooled(rows, labels)).nonzero()[:, 0]
        row_bytes = self._defence.row_bytes(rows[:1])
        if self._threat is not None:
            row_bytes += self._threat.row_bytes(rows[:1])
        step = max(1, BLOCK_BYTES // row_bytes)
        with tqdm(
            total=len(standing) * self.n_restarts, unit="row", disable=not self.verbose
        ) as progress:
            for restart in range(self.n_restarts):
                still = []
                for part in standing.split(step) if len(standing) else ():
                    point, wrong = self._climb(rows[part], labels[part], restart)
                    found[part[wrong]] = point[wrong]
                    still.append(part[~wrong])
                    # A row that has fallen needs no more restarts.
                    n_left = self.n_restarts - restart - 1
                    progress.update(len(part) + int(wrong.sum()) * n_left)
                standing = torch.cat(still) if still else standing
        return found.cpu().numpy().reshape(len(rows), *np.shape(X)[1:])

    def _check(self, X, y, name):
        rows = validate_rows(self.estimator, X)
        y = column_or_1d(y)
        check_consistent_length(rows, y)
        unknown = np.setdiff1d(y, self.estimator.classes_)
        if len(unknown):
            raise ValueError(f"{name} comes with classes that the estimator has not: {unknown}.")
        return rows, np.searchsorted(self.estimator.classes_, y)

    def _is_fooled(self, points, labels):
        wrong = self._defence.predict(points) != labels
        return wrong if self._threat is None else wrong & ~self._threat.is_alarm(points)

    def _climb(self, rows, labels, restart):
        """Climb the margin from one start; give the last points and whether they are wrong."""
        points = self._into_ball(self._start(rows, labels, restart), rows)
        wrong = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        left = torch.arange(len(rows), device=rows.device)
        scales = self._defence.scales(rows)
        for iteration in range(self.max_iter + 1):
            if iteration % self.refresh == 0 or iteration == self.max_iter:
                references, answers = self._defence.respond(points[left])
                suspects = left[answers != labels[left]]
                if len(suspects):
                    wrong[suspects] = self._is_fooled(points[suspects], labels[suspects])
                    kept = (~wrong[left]).nonzero()[:, 0]
                    left = left[kept]
                    references = {k: (f[kept], there[kept]) for k, (f, there) in references.items()}
                if len(left) == 0 or iteration == self.max_iter:
                    break
                with torch.no_grad():
                    here = self._defence.features(points[left])
                soft_scores = {
                    layer: soft_class_scores(
                        self._defence.affinity, *references[layer], here[layer], scales[layer]
                    )
                    for layer in references
                }
                threat = None if self._threat is None else self._threat.soften(points[left])
            gradient = self._slope(points[left], labels[left], soft_scores, threat, restart)
            points[left] = self._into_ball(points[left] + self.step * gradient.sign(), rows[left])
        return points, wrong

    def _start(self, rows, labels, restart):
        start = STARTS[restart % len(STARTS)]
        if start == "anywhere":
            noise = self._rng.uniform(-self.eps, self.eps, size=tuple(rows.shape))
            return rows + torch.from_numpy(noise).to(rows)
        if start == "here" or len(self.estimator.classes_) == 1:
            return rows.clone()
        affinity, index = self._inputs.kneighbors(rows, 1)
        affinity[torch.arange(len(rows), device=rows.device), labels] = -torch.inf
        nearest = affinity[..., 0].argmax(dim=1)
        # The whole way: the ball cuts it short.
        return self._train[index[..., 0].gather(1, nearest[:, None])[:, 0]]

    def _into_ball(self, points, rows):
        points = points.clamp(rows - self.eps, rows + self.eps)
        return points if self.clip is None else points.clamp(*self.clip)

    def _slope(self, points, labels, soft_scores, threat, restart):
        points = points.detach().requires_grad_()
        total = 0
        own = one_hot(labels, len(self.estimator.classes_)).bool()
        lead = 0
        if self._defence.has_arbiter and restart % 2 == 0:
            logits = self._defence.logits(points)
            lead = (logits - logits[own][:, None]).clamp(max=LOGIT_LEAD)
        for layer, features in self._defence.features(points).items():
            scores = soft_scores[layer](features) + lead
            if restart % 4 < 2:
                others = scores.masked_fill(own, -torch.inf).amax(dim=1)
            else:
                others = torch.logsumexp(scores, dim=1)
            total = total + (others - scores[own]).sum()
        if threat is not None:
            total = total - self.threat_weight * threat(points).sum()
        return torch.autograd.grad(total, points)[0]


def soft_class_scores(affinity, members, there, origin, scale):
    """Give a function from features to the classes' softened nearness.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
    members : torch.Tensor of shape (n, n_classes, n_members, n_features)
        Constant references.
    there : torch.Tensor of shape (n, n_classes, n_members)
        Which of them count.
    origin : torch.Tensor of shape (n, n_features)
        Features near those that will be scored.
    scale : float
        What affinities are divided by.

    Returns
    -------
    callable
        From a tensor of shape (n, n_features) to the scores (n, n_classes).
    """
    nearness = nearness_to(affinity, members.flatten(1, 2), origin)

    def score(features):
        close = nearness(features).reshape(there.shape).masked_fill(~there, -torch.inf)
        return torch.logsumexp(close / scale, dim=2)

    return score


def nearness_to(affinity, members, origin):
    """Give a function that compares features with constant references, and reads these only once.

    Parameters
    ----------
    affinity : {"euclidean", "cosine", "inner_product"} or callable
    members : torch.Tensor of shape (n, n_members, n_features)
    origin : torch.Tensor of shape (n, n_features)
        Features near those that will be compared.

    Returns
    -------
    callable
        From a tensor of shape (n, n_features) to the affinities (n, n_members).
    """
    if affinity == "euclidean":
        # Seen from there, small distances are not lost to rounding.
        moved = members - origin[:, None]
        squares = moved.square().sum(dim=2)

        def nearness(features):
            step = features - origin
            products = torch.bmm(moved, step[:, :, None])[..., 0]
            return -(squares - 2 * products + step.square().sum(1)[:, None]).clamp(1e-12).sqrt()

        return nearness
    if affinity == "cosine":
        members = normalize(members, dim=2)
        return lambda features: torch.bmm(members, normalize(features, dim=1)[..., None])[..., 0]
    return lambda features: affinity_to(affinity, features, members)


class _References:
    """The nearest of each class's training rows, in some layers."""

    def __init__(self, features, train, labels, n_classes, n_references, affinity="euclidean"):
        self._features = features
        self._n_classes = n_classes
        self._n_references = n_references
        self.affinity = affinity
        self._examples = features(train)
        self._neighbors = {
            layer: ClassNeighbors(affinity).fit(examples, labels, n_classes)
            for layer, examples in self._examples.items()
        }

    def row_bytes(self, row):
        widest = max(f[0].nbytes for f in self._features(row).values())
        return widest * self._n_references * self._n_classes

    def near(self, rows):
        """Give the references in each layer, and which of them are there."""
        references = {}
        for layer, features in self._features(rows).items():
            _, index = self._neighbors[layer].kneighbors(features, self._n_references)
            references[layer] = self._examples[layer][index.clamp(min=0)], index >= 0
        return references

    def scales(self, rows):
        """Give a third of the median distance of the k-th neighbour, in each layer."""
        scales = {}
        for layer, features in self._features(rows).items():
            affinity, _ = self._neighbors[layer].kneighbors(features, self._n_references)
            scales[layer] = _scale_of(affinity, self._n_references)
        return scales


class _Neighbors:
    """A DkNN classifier as the attack sees it: neighbours among fixed rows."""

    affinity = "euclidean"
    has_arbiter = False

    def __init__(self, estimator, train, labels, n_references):
        self._estimator = estimator
        n_classes = len(estimator.classes_)
        self._references = _References(estimator._features, train, labels, n_classes, n_references)
        self.row_bytes = self._references.row_bytes
        self.scales = self._references.scales
        self.features = estimator._features.with_gradient

    def predict(self, rows):
        return _positions(self._estimator, self._estimator.predict(rows), rows)

    def respond(self, rows):
        """Give the references in each layer, and which of them are there, and the answers."""
        return self._references.near(rows), self.predict(rows)


class _Threat:
    """A threat scorer as the attack sees it: softened nearness in its layers."""

    def __init__(self, rails, train, labels, n_references):
        scorer = getattr(rails, "threat_scorer_", None)
        if isinstance(scorer, FrozenEstimator):
            scorer = scorer.estimator
        if not isinstance(scorer, ThreatScorer):
            raise TypeError(
                "threat_weight needs a RAILSClassifier whose threat_scorer is a ThreatScorer, got "
                f"the threat_scorer {scorer!r}."
            )
        self._scorer = scorer
        n_classes = len(rails.classes_)
        self._references = {
            # Distances of normalised features go with their cosines.
            method: _References(
                scorer._features,
                train,
                labels,
                n_classes,
                n_references,
                "cosine" if method == "distance" else "euclidean",
            )
            for method in scorer.methods_
        }

    def row_bytes(self, row):
        return sum(r.row_bytes(row) for r in self._references.values())

    def is_alarm(self, points):
        return torch.from_numpy(self._scorer.predict(points) == -1).to(points.device)

    def soften(self, points):
        """Give a threat score that is differentiable near some points."""
        features = self._scorer._features
        with torch.no_grad():
            here = features.with_gradient(points)
        soft_scores = {}
        for method, references in self._references.items():
            near, scales = references.near(points), references.scales(points)
            for layer in near:
                soft_scores[method, layer] = soft_class_scores(
                    references.affinity, *near[layer], here[layer], scales[layer]
                )

        def threat(points):
            total, found = 0, features.with_gradient(points)
            for (method, layer), score in soft_scores.items():
                scores = score(found[layer])
                total = total - scores.amax(dim=1)
                if method == "credibility":
                    total = total + torch.logsumexp(scores, dim=1)
            return total

        return threat


class _Populations:
    """A RAILS classifier as the attack sees it: cells that are bred anew at every point."""

    def __init__(self, estimator, n_references, n_seeds, n_checks, rng):
        self._estimator = estimator
        self._n_references = n_references
        self._n_cells = -(-n_references // n_seeds)
        self.affinity = estimator.affinity
        seeds = {estimator.seed_: None}
        while len(seeds) < 1 + n_seeds + n_checks:
            seeds[draw_seed(rng)] = None
        _, *others = [estimator._with({"seed_": seed, "_draws": {}}) for seed in seeds]
        self._known, self._unseen = others[:n_seeds], others[n_seeds:]
        self.has_arbiter = estimator.arbitration is not None
        self.features = estimator._features.with_gradient

    def logits(self, points):
        """Give the network's outputs, one for each class."""
        output = self._estimator._features.output
        outputs = self.features(points, (output,))[output]
        # A single output is the logit of the second of two classes.
        return outputs if outputs.shape[1] > 1 else pad(outputs, (1, 0))

    def row_bytes(self, row):
        widest = max(f[0].nbytes for f in self._estimator._features(row).values())
        return widest * self._n_cells * len(self._known) * len(self._estimator.classes_)

    def predict(self, rows):
        """Give the majority's answers, of seeds that the attack does not see."""
        answers = [_positions(rails, rails.predict(rows), rows) for rails in self._unseen]
        return torch.stack(answers).mode(dim=0).values

    def respond(self, rows):
        """Give the references in each layer, and which of them are there, and the answers."""
        references, answers = {}, []
        neighbors = {
            layer: self._estimator._flock(features, layer)[1]
            for layer, features in self._estimator._features(rows).items()
        }
        for rails in self._known:
            votes, ties = 0, 0
            for layer, flocked, population in rails._mature(rows, lambda n: None, keep_cells=True):
                layer_votes, layer_ties, _ = rails._vote(layer, flocked, population)
                votes, ties = votes + layer_votes, ties + layer_ties
                references.setdefault(layer, []).append(
                    self._best(population, neighbors[layer], layer)
                )
            scores = torch.from_numpy(rails._join_votes(votes, ties))
            answers.append(scores.argmax(dim=1).to(rows.device))
        joined = {
            layer: tuple(torch.cat(parts, dim=2) for parts in zip(*bred, strict=True))
            for layer, bred in references.items()
        }
        answers = torch.stack(answers).mode(dim=0).values
        if self.has_arbiter:
            scores, p_values = (torch.from_numpy(a) for a in self._estimator._arbitrate(rows))
            stands = (p_values > self._estimator.arbitration).to(rows.device)
            answers = torch.where(stands, scores.argmax(dim=1).to(rows.device), answers)
        return joined, answers

    def _best(self, population, neighbors, layer):
        """Give each class's fittest cells' features, or its neighbours' where it died out."""
        rails, k = self._estimator, self._n_cells
        n_rows, n_classes, _ = neighbors.shape
        classes = torch.arange(n_classes, device=neighbors.device)[:, None]
        of_class = population.labels[:, None] == classes
        affinity = population.affinity[:, None].masked_fill(~of_class, -torch.inf)
        places = fittest(affinity.flatten(0, 1), k).reshape(n_rows, n_classes, -1)
        there = affinity.gather(2, places) > -torch.inf
        rows = torch.arange(n_rows, device=neighbors.device)[:, None, None]
        cells = population.cells[rows, places]
        index = pad(neighbors, (0, k), value=-1)[..., : places.shape[2]]
        died_out = ~there.any(dim=2, keepdim=True)
        there = torch.where(died_out, index >= 0, there)
        cells = torch.where(died_out[..., None], rails._bank()[index.clamp(min=0)], cells)
        features = rails._features.from_start(cells.flatten(0, 2), layer)
        return features.reshape(n_rows, n_classes, -1, features.shape[1]), there

    def scales(self, rows):
        """Give a third of the median distance of the k-th neighbour, in each layer."""
        return {
            layer: _scale_of(self._estimator._flock(features, layer)[0], self._n_references)
            for layer, features in self._estimator._features(rows).items()
        }


def _positions(estimator, labels, rows):
    return torch.from_numpy(np.searchsorted(estimator.classes_, labels)).to(rows.device)


def _scale_of(affinity, n_neighbors):
    nearest = affinity.flatten(1).sort(dim=1, descending=True).values
    kth = nearest[:, :n_neighbors][:, -1].abs()
    scale = float(kth[kth.isfinite()].median()) / 3 if kth.isfinite().any() else 0.0
    return scale if scale > 0 else 1.0
