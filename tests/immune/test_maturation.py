import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from sklearn_rails._random import generation_uniforms
from sklearn_rails.immune.consensus import unanimous_class
from sklearn_rails.immune.maturation import (
    Domain,
    Schedule,
    class_quota,
    clone_neighbors,
    cross_over,
    mature,
    mutate_,
    mutation_steps,
    select_parents,
)

quick = settings(deadline=None, max_examples=50)
SELECTIONS = st.sampled_from(["global", "class_balanced"])
CROSSOVERS = st.sampled_from(["affinity", "uniform"])


def uniforms(seed, n_cells, n_features, dtype=torch.float64):
    drawn = generation_uniforms(seed, 0, 1, n_cells, n_features)
    return {name: u.to(dtype) for name, u in drawn.items()}


def make_population(seed, n_rows, n_cells, n_features, n_classes):
    rng = np.random.default_rng(seed)
    cells = torch.tensor(rng.random((n_rows, n_cells, n_features)))
    labels = torch.tensor(np.sort(rng.integers(n_classes, size=(n_rows, n_cells)), axis=1))
    affinity = torch.tensor(-rng.random((n_rows, n_cells)) * 10)
    return cells, labels, affinity


@quick
@given(n_classes=st.integers(1, 12), more=st.integers(0, 50))
def test_classes_share_the_cells_evenly(n_classes, more):
    quota = class_quota(n_classes + more, n_classes)
    assert sum(quota) == n_classes + more
    assert max(quota) - min(quota) <= 1
    assert quota == sorted(quota, reverse=True)


def test_cells_are_spread_evenly_over_the_neighbours_that_are_there():
    index = torch.tensor([[[7, 3, 5], [2, -1, -1]], [[1, 0, 4], [6, -1, -1]]])
    parents, labels = clone_neighbors(index, 9)
    assert labels.tolist() == [0] * 5 + [1] * 4
    assert parents.tolist() == [[7, 3, 5, 7, 3, 2, 2, 2, 2], [1, 0, 4, 1, 0, 6, 6, 6, 6]]


@quick
@given(
    seed=st.integers(0, 10**6),
    tau=st.floats(1e-6, 1e3),
    selection=SELECTIONS,
    n_classes=st.integers(1, 6),
)
def test_parents_are_of_one_class_and_children_in_its_order(seed, tau, selection, n_classes):
    _, labels, affinity = make_population(seed, 3, 20, 1, n_classes)
    first, second = select_parents(
        affinity, labels, uniforms(seed, 20, 1), tau, n_classes=n_classes, selection=selection
    )
    children = labels.gather(1, first)
    assert torch.equal(children, labels.gather(1, second))
    assert (children.diff(dim=1) >= 0).all()
    if selection == "class_balanced":
        assert torch.equal(children, labels)


def test_parents_are_drawn_with_the_probability_of_their_affinity():
    n_cells, tau = 4, 0.7
    affinity = torch.tensor([[-1.0, -2.0, -1.5, -0.5]], dtype=torch.float64)
    labels = torch.tensor([[0, 0, 1, 1]])
    p = torch.softmax(affinity[0] / tau, dim=0)
    counts = {"first": torch.zeros(n_cells), "second": torch.zeros(n_cells)}
    for seed in range(4000):
        parents = select_parents(
            affinity,
            labels,
            uniforms(seed, n_cells, 1),
            tau,
            n_classes=2,
            selection="global",
        )
        for name, parent in zip(counts, parents, strict=True):
            counts[name] += torch.bincount(parent[0], minlength=n_cells)
    # Restricted to the first one's class, which has its mass, the second is drawn from P too.
    for count in counts.values():
        assert_allclose(count / count.sum(), p, atol=0.012)  # 4 standard deviations


def test_a_cold_population_breeds_from_its_best_and_a_hot_one_from_all():
    _, labels, affinity = make_population(0, 1, 50, 1, 3)
    u = uniforms(0, 50, 1)
    cold, _ = select_parents(affinity, labels, u, 1e-9, n_classes=3, selection="global")
    assert set(cold[0].tolist()) == {int(affinity.argmax())}
    hot, _ = select_parents(affinity, labels, u, 1e9, n_classes=3, selection="global")
    assert len(set(hot[0].tolist())) > 25


@quick
@given(
    seed=st.integers(0, 10**6),
    rho=st.floats(0, 1),
    bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_mutation_keeps_its_rate_and_its_gap(seed, rho, bounds):
    delta_min, delta_max = bounds
    n = 20_000
    u = torch.tensor(np.random.default_rng(seed).random((n, 1)))
    steps = mutation_steps(u, rho, delta_min, delta_max, 1.0)
    changed = (u < rho) if delta_min == 0 else steps != 0
    tolerance = 5 * (rho * (1 - rho) / n) ** 0.5 + 5 / n  # the normal law, or the Poisson one
    assert abs(changed.double().mean() - rho) <= tolerance
    size = steps[changed].abs()
    assert ((size >= delta_min) & (size <= delta_max)).all()
    assert (steps[u >= rho] == 0).all()
    if delta_min > 0 and changed.sum() > 1000:
        assert abs((steps[changed] > 0).double().mean() - 0.5) < 5 * 0.5 / changed.sum() ** 0.5
        middle = (delta_min + delta_max) / 2
        spread = (delta_max - delta_min) / 12**0.5
        assert abs(size.mean() - middle) <= 5 * spread / changed.sum() ** 0.5 + 1e-12


@quick
@given(seed=st.integers(0, 10**6), crossover=CROSSOVERS, tau=st.floats(1e-3, 10))
def test_operators_keep_shapes_elements_and_bounds(seed, crossover, tau):
    cells, labels, affinity = make_population(seed, 2, 15, 4, 3)
    u = uniforms(seed, 15, 4)
    first, second = select_parents(affinity, labels, u, tau, n_classes=3, selection="global")
    children = cross_over(cells, affinity, first, second, u["cross"], tau, crossover=crossover)
    assert children.shape == cells.shape
    rows = torch.arange(2)[:, None]
    from_first, from_second = cells[rows, first], cells[rows, second]
    assert ((children == from_first) | (children == from_second)).all()
    steps = mutation_steps(u["mutate"], 0.5, 0.2, 0.9, 1.0)
    moved = mutate_(children.clone(), steps, Domain(1.0, 0.0, 1.0))
    assert ((moved >= 0) & (moved <= 1)).all()
    untouched = (steps == 0).expand_as(moved)
    assert torch.equal(moved[untouched], children[untouched])


def test_the_fitter_parent_gives_more():
    n_features = 20_000
    cells = torch.stack([torch.zeros(n_features), torch.ones(n_features)])[None].double()
    affinity = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    first, second = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    u = torch.tensor(np.random.default_rng(0).random((2, n_features)))
    for crossover, q in (("affinity", 1 / (1 + np.exp(-1 / 0.5))), ("uniform", 0.5)):
        children = cross_over(cells, affinity, first, second, u, 0.5, crossover=crossover)
        of_cell_0 = (children[0] == 0).double().mean(dim=1)
        # Cell 0 is the fitter one, and both children's parent, once the first and once the second.
        assert_allclose(of_cell_0, [q, q], atol=0.02)


def breed(seed, n_rows, *, early_stopping, rows=None):
    left = []
    cells, _, _ = make_population(seed, n_rows, 24, 5, 3)
    antigens = torch.tensor(np.random.default_rng(seed + 1).random((n_rows, 5)))
    rows = torch.arange(n_rows) if rows is None else rows
    cells, antigens = cells[rows], antigens[rows]
    schedule = Schedule(
        generations=5,
        selection="global",
        crossover="affinity",
        n_plasma=3,
        early_stopping=early_stopping,
    )

    def draw(generation):
        drawn = {k: u.double() for k, u in generation_uniforms(7, 0, generation, 24, 5).items()}
        return {**drawn, "steps": mutation_steps(drawn["mutate"], 0.2, 0.05, 0.15, 1.0)}

    population = mature(
        cells,
        torch.tensor([0] * 8 + [1] * 8 + [2] * 8),
        measure=lambda c, r: -torch.linalg.vector_norm(c - antigens[r][:, None], dim=2),
        draw=draw,
        tau=0.05,
        schedule=schedule,
        domain=Domain(1.0, 0.0, 1.0),
        n_classes=3,
        keep_cells=True,
        on_decided=left.append,
    )
    assert sum(left) == len(rows)
    return population


@quick
@given(seed=st.integers(0, 10**6), order=st.permutations(range(8)), size=st.integers(1, 8))
def test_a_row_matures_alike_in_any_company(seed, order, size):
    whole = breed(seed, 8, early_stopping=True)
    rows = torch.tensor(order[:size])
    part = breed(seed, 8, early_stopping=True, rows=rows)
    for name, values in vars(part).items():
        torch.testing.assert_close(
            values, getattr(whole, name)[rows], rtol=0, atol=0, equal_nan=True
        )


@quick
@given(seed=st.integers(0, 10**6))
def test_early_stopping_cuts_the_same_course_short(seed):
    full, short = breed(seed, 6, early_stopping=False), breed(seed, 6, early_stopping=True)
    assert (full.n_generations == 5).all()
    for row, last in enumerate(short.n_generations.tolist()):
        assert_allclose(short.affinity_curve[row, : last + 1], full.affinity_curve[row, : last + 1])
        assert short.affinity_curve[row, last + 1 :].isnan().all()
        assert_allclose(short.class_curve[row, : last + 1].sum(dim=1), 1)
        if last < 5:
            assert unanimous_class(short.affinity, short.labels, 3)[row] >= 0
    assert (short.labels.diff(dim=1) >= 0).all()
