"""Algorithm 1 of Wang et al. (2021), one row, one cell and one element at a time, in float64.

Written from the description of the algorithm, not from the engine, to be compared with it number
for number. Slow on purpose.
"""

import math
from types import SimpleNamespace

import numpy as np


def affinity_function(affinity):
    """The affinity of two vectors, as a function of both."""
    if callable(affinity):
        return affinity

    def dot(a, b):
        total = 0.0
        for i in range(len(a)):
            total += float(a[i]) * float(b[i])
        return total

    def length(a):
        # In units of a power of two, which round nothing, and whose squares are floats.
        unit = 2.0 ** math.frexp(max(abs(float(value)) for value in a))[1]
        total = 0.0
        for value in a:
            total += (float(value) / unit) ** 2
        return math.sqrt(total) * unit

    def euclidean(a, b):
        return -length([float(a[i]) - float(b[i]) for i in range(len(a))])

    def cosine(a, b):
        if length(a) == 0 or length(b) == 0:
            return 0.0
        return dot([value / length(a) for value in a], [value / length(b) for value in b])

    return {"euclidean": euclidean, "cosine": cosine, "inner_product": dot}[affinity]


def softmax(values, tau):
    """Boltzmann weights of affinities at temperature tau."""
    largest = max(values)
    weights = []
    for value in values:
        weights.append(math.exp((value - largest) / tau))
    total = 0.0
    for weight in weights:
        total += weight
    return [weight / total for weight in weights]


def draw(weights, u):
    """The first position whose cumulative weight exceeds the uniform number u."""
    cumulative = 0.0
    last_possible = 0
    for position, weight in enumerate(weights):
        cumulative += weight
        if cumulative > u:
            return position
        if weight > 0:
            last_possible = position
    return last_possible  # the weights sum to a little less than 1


def draw_within_class(label, affinities, labels, u, tau):
    """A member of one class, drawn from the selection probabilities renormalised to the class."""
    members = [p for p in range(len(labels)) if labels[p] == label]
    return members[draw(softmax([affinities[p] for p in members], tau), u)]


def best_first(affinities):
    """Positions by decreasing affinity, ties by position."""
    return sorted(range(len(affinities)), key=lambda p: (-affinities[p], p))


def share_count(fraction, T):
    """At least one cell; 0.07 of 100 cells is 7 of them, though 0.07 * 100 exceeds 7 in floats."""
    return max(1, math.ceil(round(fraction * T, 9)))


def leader_of(affinities, labels, n_plasma):
    """The class that all plasma cells are of, if it is one, and its lead over all others."""
    order = best_first(affinities)
    plasma = {labels[p] for p in order[:n_plasma]}
    if len(plasma) > 1:
        return None, None
    leader = plasma.pop()
    others = [affinities[p] for p in order if labels[p] != leader]
    return leader, affinities[order[0]] - others[0] if others else math.inf


def mutate(cell, uniforms, rho, delta_min, delta_max, unit, low, high):
    """Change each element with probability rho by +-U[delta_min, delta_max], then clip."""
    D = len(cell)
    unit = np.broadcast_to(unit, D)
    mutated = np.empty(D)
    for e in range(D):
        value = float(cell[e])
        u = float(uniforms[e])
        if u < rho:
            v = 2 * u / rho
            if v < 1:
                size = delta_min + (delta_max - delta_min) * v
                value = value + size * unit[e]
            else:
                size = delta_min + (delta_max - delta_min) * (v - 1)
                value = value - size * unit[e]
        if low is not None:
            value = max(value, np.broadcast_to(low, D)[e])
        if high is not None:
            value = min(value, np.broadcast_to(high, D)[e])
        mutated[e] = value
    return mutated


def respond_in_layer(
    Z,
    F,
    y,
    n_classes,
    q,
    f,
    draws,
    *,
    k,
    T,
    G,
    tau,
    rho,
    delta_min,
    delta_max,
    unit=1.0,
    low=None,
    high=None,
    affinity="euclidean",
    selection="global",
    crossover="affinity",
    plasma_fraction=0.05,
    memory_fraction=0.25,
    settling_lead=None,
):
    """One antigen's response in one layer: flocking, expansion, optimization, plasma and memory.

    With a settling_lead, it ends early: once the plasma is of one class that leads all others by
    more than that, which clones may be before they are mutated, or that the plasma was of in the
    generation before too.

    Z : training cells (n_train, D); F : their features (n_train, d); y : class indices;
    q : the antigen's features (d,); f : features (d,) of a cell (D,);
    draws(g) : uniform numbers, "first" (T,), "second" (T,), "cross" (T, D), "mutate" (T, D).
    """
    D = Z.shape[1]
    measure = affinity_function(affinity)

    # Flocking.
    train_affinities = [float(measure(F[i], q)) for i in range(len(F))]
    neighbors = []
    for c in range(n_classes):
        members = [i for i in range(len(y)) if y[i] == c]
        order = best_first([train_affinities[i] for i in members])
        neighbors.append([members[p] for p in order[:k]])

    # Expansion.
    cells, affinities, labels = [], [], []
    for c in range(n_classes):
        quota = T // n_classes + (1 if c < T % n_classes else 0)
        for j in range(quota):
            parent = neighbors[c][j % len(neighbors[c])]
            cells.append(Z[parent])
            affinities.append(train_affinities[parent])
            labels.append(c)
    quota_labels = list(labels)

    def mature(cells, g):
        uniforms = draws(g)["mutate"]
        matured, affinities = [], []
        for i in range(T):
            cell = mutate(cells[i], uniforms[i], rho, delta_min, delta_max, unit, low, high)
            matured.append(cell)
            affinities.append(float(measure(f(cell), q)))
        return matured, affinities

    def summary():
        return (
            sum(affinities) / T,
            [sum(label == c for label in labels) / T for c in range(n_classes)],
        )

    n_plasma = share_count(plasma_fraction, T)
    leaders = [None]

    def is_settled():
        if settling_lead is None:
            return False
        leader, lead = leader_of(affinities, labels, n_plasma)
        leaders.append(leader)
        # Clones are not yet a generation.
        again = len(leaders) > 3 and leader == leaders[-2]
        return leader is not None and (again or lead > settling_lead)

    curve = [summary()]
    n_generations = -1
    if not is_settled():
        cells, affinities = mature(cells, 0)
        curve = [summary()]
        n_generations = 0

    # Optimization.
    for g in range(1, G + 1):
        if n_generations < g - 1 or is_settled():
            break
        uniforms = draws(g)
        sorted_first = sorted(float(u) for u in uniforms["first"])
        P = softmax(affinities, tau)
        children, child_labels = [], []
        for i in range(T):
            if selection == "global":
                one = draw(P, sorted_first[i])
            else:
                u = float(uniforms["first"][i])
                one = draw_within_class(quota_labels[i], affinities, labels, u, tau)
            u = float(uniforms["second"][i])
            two = draw_within_class(labels[one], affinities, labels, u, tau)
            if crossover == "affinity":
                share_of_one = softmax([affinities[one], affinities[two]], tau)[0]
            else:
                share_of_one = 0.5
            child = np.empty(D)
            for e in range(D):
                parent = one if float(uniforms["cross"][i][e]) < share_of_one else two
                child[e] = cells[parent][e]
            children.append(child)
            child_labels.append(labels[one])
        labels = child_labels
        cells, affinities = mature(children, g)
        curve.append(summary())
        n_generations = g

    curve += [(math.nan, [math.nan] * n_classes)] * (G + 1 - len(curve))

    # Plasma and memory.
    order = best_first(affinities)
    nearest = []
    for c in range(n_classes):
        best = train_affinities[neighbors[c][0]]
        for i in range(T):
            if labels[i] == c:
                best = max(best, affinities[i])
        nearest.append(best)
    return SimpleNamespace(
        neighbors=neighbors,
        cells=np.array(cells),
        labels=np.array(labels),
        affinities=np.array(affinities),
        affinity_curve=np.array([mean for mean, _ in curve]),
        class_curve=np.array([shares for _, shares in curve]),
        n_generations=n_generations,
        plasma=order[:n_plasma],
        memory=order[: share_count(memory_fraction, T)],
        nearest=nearest,
        tau=tau,
    )


def consensus(layers, n_classes):
    """Decision scores and probabilities of one antigen from its responses in all layers."""
    scores = []
    for c in range(n_classes):
        votes = 0
        tie_break = 0.0
        for layer in layers:
            for position in layer.plasma:
                if layer.labels[position] == c:
                    votes += 1
            # z / (1 + |z|) for z = away / tau, which need not be a float.
            away = layer.nearest[c] - sum(layer.nearest) / n_classes
            tie_break += 0.25 * (1 + away / (layer.tau + abs(away)))
        scores.append(votes + tie_break / len(layers))
    total = sum(scores)
    return np.array(scores), np.array([score / total for score in scores])
