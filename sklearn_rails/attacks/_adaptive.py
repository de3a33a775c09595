"""An attack on neighbours and populations, not on the network."""

import itertools

import numpy as np
import torch
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils.validation import check_consistent_length, check_is_fitted
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from .._dknn import DkNNClassifier
from .._rails import RAILSClassifier
from .._validation import validate_rows
from ..immune.flocking import ClassNeighbors
from ._views import NeighborsView, PopulationsView, ThreatView, soft_class_scores

# Where the restarts set out from, in turn.
STARTS = ("here", "toward another class", "anywhere", "anywhere", "anywhere")

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

    Where RAILS arbitrates, an attacker may fool the vote, or the network toward a class that the
    neighbours do not rule out. Each restart is then made twice, the second time with what the
    network's logits are behind that of :math:`y` added to the scores. Where RAILS breeds alarms
    alone (``triage``), the references are the flocked neighbours, which vote on all other rows.
    With a ``threat_weight`` the attack also keeps away from alarms: it descends that multiple of a
    softened threat score, for which the same :math:`s_c` are taken in the layers of the threat
    scorer, and only answers that are wrong and raise no alarm count.

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
        :class:`~sklearn_rails.ThreatScorer`. 0 ignores alarms. Try several, and count a row as
        held only if it is under all of them: with too large a weight the attack keeps away from
        alarms and fools nothing.
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
            self._defence = PopulationsView(estimator, n_references, n_seeds, n_checks, self._rng)
        else:
            self._defence = NeighborsView(estimator, train, labels, n_references)
        self._threat = None
        if threat_weight > 0:
            self._threat = ThreatView(estimator, train, labels, n_references)

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
        # To fool the vote does not take the network, to keep its label standing does.
        aims = (False, True) if self._defence.has_arbiter else (False,)
        climbs = list(itertools.product(range(self.n_restarts), aims))
        with tqdm(
            total=len(standing) * len(climbs), unit="row", disable=not self.verbose
        ) as progress:
            for number, (restart, with_network) in enumerate(climbs, start=1):
                still = []
                for part in standing.split(step) if len(standing) else ():
                    point, wrong = self._climb(rows[part], labels[part], restart, with_network)
                    found[part[wrong]] = point[wrong]
                    still.append(part[~wrong])
                    # A row that has fallen needs no more restarts.
                    n_left = len(climbs) - number
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

    def _climb(self, rows, labels, restart, with_network):
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
            gradient = self._slope(
                points[left], labels[left], soft_scores, threat, restart, with_network
            )
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

    def _slope(self, points, labels, soft_scores, threat, restart, with_network):
        points = points.detach().requires_grad_()
        total = 0
        own = one_hot(labels, len(self.estimator.classes_)).bool()
        behind = 0
        if with_network:
            logits = self._defence.logits(points)
            # An attacker has no use for more of a lead than it takes to fool the network.
            behind = (logits - logits[own][:, None]).clamp(max=0)
        for layer, features in self._defence.features(points).items():
            scores = soft_scores[layer](features) + behind
            if restart % 4 < 2:
                others = scores.masked_fill(own, -torch.inf).amax(dim=1)
            else:
                others = torch.logsumexp(scores, dim=1)
            total = total + (others - scores[own]).sum()
        if threat is not None:
            total = total - self.threat_weight * threat(points).sum()
        return torch.autograd.grad(total, points)[0]
