from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from sklearn_rails.immune.domain import Domain, find_domain
from sklearn_rails.immune.maturation import Schedule, mature
from sklearn_rails.immune.operators import (
    check_alive,
    class_quota,
    clone_neighbors,
    cross_over,
    first_parent_share,
    leading_class,
    mean_affinity,
    mutate_,
    replace_non_finite,
    select_parents,
)
from sklearn_rails.immune.random import (
    Mutation,
    RandomStream,
    generation_uniforms,
    mutation_steps,
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


def test_cells_are_spread_evenly_over_the_neighbours():
    index = torch.tensor([[[7, 3, 5], [2, -1, -1]], [[1, 0, 4], [6, -1, -1]]])
    parents, labels, affinity = clone_neighbors(index, -index / 2, 9)
    assert labels.tolist() == [[0] * 5 + [1] * 4] * 2
    assert parents.tolist() == [[7, 3, 5, 7, 3, 2, 2, 2, 2], [1, 0, 4, 1, 0, 6, 6, 6, 6]]
    assert torch.equal(affinity, -parents / 2)


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
    q = first_parent_share(affinity, first, second, tau, crossover)
    children = cross_over(cells, first, second, q, u["cross"])
    assert children.shape == cells.shape
    rows = torch.arange(2)[:, None]
    from_first, from_second = cells[rows, first], cells[rows, second]
    assert ((children == from_first) | (children == from_second)).all()
    steps = mutation_steps(u["mutate"], 0.5, 0.2, 0.9, 1.0)
    moved = mutate_(children.clone(), steps, Domain(1.0, 0.0, 1.0))
    assert ((moved >= 0) & (moved <= 1)).all()
    untouched = (steps == 0).expand_as(moved)
    assert torch.equal(moved[untouched], children[untouched])


def test_the_fitter_parent_contributes_more():
    n_features = 20_000
    cells = torch.stack([torch.zeros(n_features), torch.ones(n_features)])[None].double()
    affinity = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    first, second = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    u = torch.tensor(np.random.default_rng(0).random((2, n_features)))
    for crossover, expected in (("affinity", 1 / (1 + np.exp(-1 / 0.5))), ("uniform", 0.5)):
        q = first_parent_share(affinity, first, second, 0.5, crossover)
        children = cross_over(cells, first, second, q, u)
        of_cell_0 = (children[0] == 0).double().mean(dim=1)
        # Cell 0 is the fitter one, and both children's parent, once the first and once the second.
        assert_allclose(of_cell_0, [expected, expected], atol=0.02)


def breed(seed, n_rows, *, early_stopping, rows=None):
    left = []
    cells, _, _ = make_population(seed, n_rows, 24, 5, 3)
    antigens = torch.tensor(np.random.default_rng(seed + 1).random((n_rows, 5)))
    rows = torch.arange(n_rows) if rows is None else rows
    cells, antigens = cells[rows], antigens[rows]
    schedule = Schedule(
        population_size=24,
        generations=5,
        selection="global",
        crossover="affinity",
        n_plasma=3,
        n_memory=6,
        early_stopping=early_stopping,
    )

    population = mature(
        cells,
        torch.tensor([0] * 8 + [1] * 8 + [2] * 8),
        antigens,
        affinities=lambda c, a: -torch.linalg.vector_norm(c - a[:, None], dim=2),
        stream=RandomStream(7, 0, (24, 5), Mutation(0.2, 0.05, 0.15), 1.0),
        tau=0.05,
        settling_lead=0.2,
        schedule=schedule,
        domain=Domain(1.0, 0.0, 1.0),
        n_classes=3,
        keep_cells=True,
        progress=SimpleNamespace(add_populations=left.append),
    )
    assert sum(left) == len(rows)
    return population


@quick
@given(seed=st.integers(0, 10**6), order=st.permutations(range(8)), size=st.integers(1, 8))
def test_maturation_does_not_depend_on_the_batch(seed, order, size):
    whole = breed(seed, 8, early_stopping=True)
    rows = torch.tensor(order[:size])
    part = breed(seed, 8, early_stopping=True, rows=rows)
    for name, values in vars(part).items():
        torch.testing.assert_close(
            values, getattr(whole, name)[rows], rtol=0, atol=0, equal_nan=True
        )


@quick
@given(seed=st.integers(0, 10**6))
def test_early_stopping_stops_the_same_course_earlier(seed):
    full, short = breed(seed, 6, early_stopping=False), breed(seed, 6, early_stopping=True)
    assert (full.n_generations == 5).all()
    for row, last in enumerate(short.n_generations.tolist()):
        assert_allclose(short.affinity_curve[row, : last + 1], full.affinity_curve[row, : last + 1])
        assert short.affinity_curve[row, last + 1 :].isnan().all()
        assert_allclose(short.class_curve[row, : last + 1].sum(dim=1), 1)
        if last < 5:
            assert leading_class(short.affinity, short.labels, 3)[0][row] >= 0
    assert (short.labels.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("selection", ["global", "class_balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1e-320, 1e-30, 1e-3, 1.0, 1e30, 1e300])
def test_parents_are_living_cells_of_one_class_at_any_temperature(tau, dtype, selection):
    limit = torch.finfo(dtype).max
    rng = np.random.default_rng(0)
    labels = torch.arange(4).repeat_interleave(6).expand(50, -1)
    affinity = torch.tensor(rng.normal(size=(50, 24)), dtype=dtype)
    affinity[:10] *= limit / 10  # near the limits
    affinity[10:20] = 1.0  # all alike
    affinity[20:30, ::5] = torch.inf
    dead = torch.tensor(rng.random((50, 24)) < 0.5)
    dead[:, 7] = False
    dead[30:35, 18:] = dead[35:40, :6] = True  # whole classes, at either end
    affinity[dead] = torch.nan
    affinity = replace_non_finite(affinity)
    for seed in range(20):
        u = uniforms(seed, 24, 1, dtype)
        # The largest number below 1, which rounding may carry over the edge.
        u["first"][0] = u["second"][0] = 1 - 2**-24
        first, second = select_parents(affinity, labels, u, tau, n_classes=4, selection=selection)
        for parents in (first, second):
            assert not dead.gather(1, parents).any()
        assert torch.equal(labels.gather(1, first), labels.gather(1, second))
        assert (labels.gather(1, first).diff(dim=1) >= 0).all()
        q = first_parent_share(affinity, first, second, tau, "affinity")
        cells, numbers = torch.rand(50, 24, 3, dtype=dtype), torch.rand(24, 3, dtype=dtype)
        children = cross_over(cells, first, second, q, numbers)
        assert children.isfinite().all()


def test_cells_that_are_alike_are_drawn_alike():
    affinity, labels = torch.zeros(1, 10), torch.arange(2).repeat_interleave(5)[None]
    counts = torch.zeros(10)
    for seed in range(400):
        u = uniforms(seed, 10, 1, torch.float32)
        first, _ = select_parents(affinity, labels, u, 1e-30, n_classes=2, selection="global")
        counts += torch.bincount(first[0], minlength=10)
    assert_allclose(counts / 4000, 0.1, atol=0.02)  # 4 standard deviations


@pytest.mark.slow
def test_populations_beyond_what_float32_counts_are_drawn_from_as_a_whole():
    n_cells = 2**24 + 1000
    affinity, labels = torch.zeros(1, n_cells), torch.zeros(1, n_cells, dtype=torch.int64)
    labels[:, -900:] = 1
    u = {name: torch.linspace(0, 1 - 2**-24, n_cells) for name in ("first", "second")}
    first, second = select_parents(affinity, labels, u, 1.0, n_classes=2, selection="global")
    assert first.max() >= n_cells - 2
    assert (labels.gather(1, first) == labels.gather(1, second)).all()


def test_classes_without_neighbours_have_no_cells():
    index = torch.tensor([[[-1, -1], [7, 3], [-1, -1], [5, -1]]] * 2)
    parents, labels, affinity = clone_neighbors(index, -index / 2, 5)
    assert labels.tolist() == [[1, 1, 1, 3, 3]] * 2
    assert parents.tolist() == [[7, 3, 7, 5, 5]] * 2
    assert torch.equal(affinity, -parents / 2)
    # An approximate index finds other numbers for other rows.
    index[1, 0, 0] = 9
    index[1, 1, 1] = -1
    parents, labels, affinity = clone_neighbors(index, -index / 2, 5)
    assert labels.tolist() == [[1, 1, 1, 3, 3], [0, 0, 1, 1, 3]]
    assert parents.tolist() == [[7, 3, 7, 5, 5], [9, 9, 7, 7, 5]]
    assert torch.equal(affinity, -parents / 2)
    with pytest.raises(ValueError, match="No neighbours were found"):
        clone_neighbors(torch.full((1, 3, 2), -1), torch.full((1, 3, 2), -torch.inf), 5)


def breed_with(measure, *, early_stopping=True, rows=slice(None)):
    cells, labels, _ = (part[rows] for part in make_population(0, 6, 24, 5, 3))

    return mature(
        cells,
        labels,
        torch.arange(len(cells))[:, None],
        affinities=lambda c, a: measure(c, a[:, 0]),
        stream=RandomStream(7, 0, (24, 5), Mutation(0.2, 0.05, 0.15), 1.0),
        tau=0.05,
        settling_lead=torch.inf,
        schedule=Schedule(24, 3, "global", "affinity", 12, 12, early_stopping),
        domain=Domain(1.0, 0.0, 1.0),
        n_classes=3,
        keep_cells=True,
    )


@pytest.mark.parametrize("early_stopping", [False, True])
def test_cells_without_an_affinity_never_win(early_stopping):
    def is_missing(cells):
        # About half of them, in every generation.
        return (cells[..., 0] * 1000) % 1 > 0.5

    def measure(cells, rows):
        return torch.where(is_missing(cells), torch.nan, -cells.sum(dim=2))

    population = breed_with(measure, early_stopping=early_stopping)
    assert population.affinity.isfinite().all()
    assert not is_missing(population.cells).any()
    for row in range(6):  # in whatever company
        alone = breed_with(measure, early_stopping=early_stopping, rows=[row])
        for name, values in vars(alone).items():
            torch.testing.assert_close(
                values[0], getattr(population, name)[row], rtol=0, atol=0, equal_nan=True
            )
    assert_allclose(population.affinity, -population.cells.sum(dim=2))
    for curve in (population.affinity_curve, population.class_curve):
        for row, last in enumerate(population.n_generations):
            assert curve[row, : last + 1].isfinite().all()


def test_an_infinite_affinity_counts_as_the_largest_number():
    population = breed_with(lambda cells, rows: 1 / (cells - 1).clamp(max=0).abs().sum(dim=2) ** 9)
    assert population.affinity.isfinite().all()
    largest = breed_with(lambda cells, rows: torch.full(cells.shape[:2], torch.inf).double())
    assert (largest.affinity == torch.finfo(torch.float64).max).all()
    assert largest.affinity_curve[:, 0].isfinite().all()


def test_a_population_without_any_affinity_is_refused():
    population = breed_with(lambda cells, rows: torch.full(cells.shape[:2], torch.nan).double())
    with pytest.raises(ValueError, match=r"layers='conv1': all cells.*set clip"):
        check_alive(population.affinity, "conv1")
    check_alive(breed_with(lambda cells, rows: -cells.sum(dim=2)).affinity, "conv1")


@pytest.mark.parametrize("clip", [("a", "b"), (1, 0), (0, 1, 2), (np.nan, 1), 3])
def test_invalid_clip_raises(clip):
    with pytest.raises(ValueError, match="clip=.*must be 'auto', None or a pair"):
        find_domain(torch.rand(5, 2), clip)


def test_a_range_that_cannot_be_represented_is_refused():
    cells = torch.tensor([[3e38], [-3e38]])
    with pytest.raises(ValueError, match=r"range of a feature of X.*scale X"):
        find_domain(cells, "auto")
    assert find_domain(cells.double(), "auto").unit == pytest.approx(6e38)


@pytest.mark.parametrize("selection", ["global", "class_balanced"])
def test_parents_are_of_one_class_where_no_cell_has_an_affinity(selection):
    labels = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)
    affinity = torch.tensor([[-1.0, -2, -3, -torch.inf, -3, -4], [-torch.inf] * 6])
    u = {"first": torch.linspace(0, 0.999, 6), "second": torch.linspace(0.999, 0, 6)}
    first, second = select_parents(affinity, labels, u, 1.0, n_classes=3, selection=selection)
    assert torch.equal(labels.gather(1, first), labels.gather(1, second))
    assert 3 not in torch.stack([first, second])[:, 0]
    assert torch.equal(labels.gather(1, first)[1], labels[1])


@pytest.mark.parametrize(
    ("u", "affinity", "labels", "expected"),
    [
        # 4 weights of 0 to 1 stand before class 1, in which the draw is at 1 - 2**-53 of 1.
        (0.5, [-1e3] * 4 + [0.0, -(2**-52)], [0] * 4 + [1, 2], 4),
        # A draw at the border of classes 0 and 1, which the sum of masses 0 and 1 moves by 2**-53.
        (0.125, [-(2**-53)] + [0.0] * 3 + [-(2**-52)] * 4, [0] + [1] * 3 + [2] * 4, 1),
    ],
)
def test_rounding_carries_no_draw_over_the_edge_of_its_class(u, affinity, labels, expected):
    affinity, labels = torch.tensor([affinity], dtype=torch.float64), torch.tensor([labels])
    draws = {name: torch.full((len(labels[0]),), u).double() for name in ("first", "second")}
    first, second = select_parents(affinity, labels, draws, 1.0, n_classes=3, selection="global")
    assert (first == expected).all()
    assert (labels.gather(1, second) == 1).all()


@pytest.mark.parametrize("selection", ["global", "class_balanced"])
def test_the_smallest_draw_is_of_the_first_cell_with_an_affinity(selection):
    affinity = torch.tensor([[-torch.inf, -1.0, -2.0, -torch.inf, -3.0]])
    labels, zeros = torch.tensor([[0, 0, 0, 1, 1]]), torch.zeros(5)
    first, second = select_parents(
        affinity, labels, {"first": zeros, "second": zeros}, 1.0, n_classes=2, selection=selection
    )
    expected = [1] * 5 if selection == "global" else [1, 1, 1, 4, 4]
    assert first.tolist() == second.tolist() == [expected]


def test_many_unlikely_cells_are_drawn_together():
    # Each has 2**-25 of the best one's chance, which float32 loses beside it; all have 2**-9.
    affinity = torch.full((1, 2**16 + 1), -25 * float(np.log(2)))
    affinity[0, 0] = 0
    u = {name: torch.full((2**16 + 1,), 1 - 2**-10) for name in ("first", "second")}
    for parents in select_parents(
        affinity, torch.zeros_like(affinity).long(), u, 1.0, n_classes=1, selection="global"
    ):
        assert 2**14 < parents[0, 0] < 2**16


def test_the_mean_affinity_is_of_cells_that_have_one_and_does_not_overflow():
    largest = torch.finfo(torch.float32).max
    affinity = torch.tensor([[-1.0, -torch.inf, -4.0], [largest] * 3, [-largest] * 3])
    assert mean_affinity(affinity).tolist() == [-2.5, largest, -largest]
    assert mean_affinity(affinity[:1] * torch.inf).isnan().all()


def test_bounds_may_be_open_or_the_largest_numbers_but_not_beyond():
    cells, largest = torch.tensor([[-1.0, 2.0], [0.0, 6.0]]), torch.finfo(torch.float32).max
    for clip in [(-largest, largest), (0.5, np.inf)]:
        domain = find_domain(cells, clip)
        assert (domain.low, domain.high) == clip
        assert domain.unit.tolist() == [1, 4]
    with pytest.raises(ValueError, match="clip=.* is beyond what float32 holds"):
        find_domain(cells, (0.0, 1e39))
    for within in (torch.tensor([[0.0], [0.5]]), torch.tensor([[1.0]])):
        assert find_domain(within, "auto") == Domain(1.0, 0.0, 1.0)
        assert find_domain(within, None) == Domain(1.0, None, None)
    for beyond in (torch.tensor([[0.0], [1.5]]), torch.tensor([[-0.5], [1.0]])):
        domain = find_domain(beyond, "auto").on(beyond)
        assert torch.equal(torch.stack([domain.low, domain.high]), beyond)
        assert torch.equal(domain.unit, beyond[1] - beyond[0])
