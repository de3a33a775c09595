import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sklearn_rails.immune.consensus import (
    class_affinity,
    count_votes,
    rank_by_affinity,
    tie_break,
    top_count,
)
from sklearn_rails.immune.operators import leading_class, replace_non_finite


def test_top_count_is_at_least_one():
    assert top_count(0.05, 200) == 10
    assert top_count(0.05, 201) == 11
    assert top_count(0.07, 100) == 7
    assert top_count(0.05, 3) == 1
    assert top_count(1.0, 3) == 3


def test_ranking_breaks_ties_by_position():
    affinity = torch.tensor([[-1.0, -0.5, -1.0, -0.5, -2.0]])
    assert rank_by_affinity(affinity, 4).tolist() == [[1, 3, 0, 2]]


def test_the_leader_is_the_class_of_all_plasma_and_its_lead_that_over_all_others():
    affinity = torch.tensor([[-1.0, -2.0, -3.5]] * 3)
    labels = torch.tensor([[1, 1, 2], [0, 2, 2], [1, 1, 1]])
    leader, lead = leading_class(affinity, labels, 2)
    assert leader.tolist() == [1, -1, 1]
    assert lead[[0, 2]].tolist() == [2.5, torch.inf]
    # A single cell with an affinity is enough.
    leader, lead = leading_class(torch.tensor([[-torch.inf, -2.0, -torch.inf]]), labels[:1], 2)
    assert (leader.item(), lead.item()) == (1, torch.inf)


def test_votes_are_counted():
    assert count_votes(torch.tensor([[0, 2, 2], [1, 1, 1]]), 3).tolist() == [[1, 0, 2], [0, 3, 0]]


def test_a_class_that_died_out_has_the_affinity_of_its_nearest_neighbour():
    affinity, labels = torch.tensor([[-1.0, -3.0, -5.0]]), torch.tensor([[0, 0, 2]])
    flocked = torch.tensor([[[-4.0, -6.0], [-2.0, -7.0], [-4.5, -9.0]]])
    assert class_affinity(affinity, labels, flocked).tolist() == [[-1.0, -2.0, -4.5]]


@settings(deadline=None)
@given(
    affinity=st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6),
    tau=st.floats(1e-6, 1e3),
)
def test_tie_break_is_less_than_half_a_vote(affinity, tau):
    affinity = torch.tensor([affinity], dtype=torch.float64)
    term = tie_break(affinity, tau)
    assert ((term >= 0) & (term <= 0.5)).all()
    order = np.argsort(affinity[0].numpy(), kind="stable")
    assert (np.diff(term[0].numpy()[order]) >= 0).all()


def test_tie_break_does_not_level_off():
    near = tie_break(torch.tensor([[-1.0, -1000.0]]), 0.1)
    nearer = tie_break(torch.tensor([[-1.0, -1001.0]]), 0.1)
    assert near[0, 1] > nearer[0, 1] > 0
    assert nearer[0, 0] > near[0, 0]


def test_cells_without_an_affinity_come_last_and_do_not_vote():
    affinity = torch.tensor([[torch.nan, -1.0, -torch.inf, -2.0], [torch.nan] * 4])
    affinity = replace_non_finite(affinity)
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])
    assert rank_by_affinity(affinity, 4)[0].tolist() == [1, 3, 0, 2]
    assert leading_class(affinity, labels, 4)[0].tolist() == [1, -1]
    flocked = torch.tensor([[[-4.0], [-3.0], [-torch.inf]]] * 2)
    assert class_affinity(affinity, labels, flocked).tolist() == [
        [-4.0, -1.0, -torch.inf],
        [-4.0, -3.0, -torch.inf],
    ]


def test_top_count_accepts_any_number_type():
    for kind in (np.float16, np.float32, np.float64):
        assert top_count(kind(0.1), np.uint8(200)) in (20, 21)
        assert top_count(kind(1), 10**6) == 10**6


@settings(deadline=None)
@given(
    affinity=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5),
    place=st.integers(0, 5),
    tau=st.sampled_from([1e-300, 1e-30, 1.0, 1e30, 1e300]),
)
def test_a_class_without_an_affinity_changes_no_other_term(affinity, place, tau):
    expected = tie_break(torch.tensor([affinity], dtype=torch.float64), tau)[0].tolist()
    expected.insert(place, 0.0)
    affinity.insert(place, -torch.inf)
    found = tie_break(torch.tensor([affinity], dtype=torch.float64), tau)
    assert found[0].tolist() == expected


@settings(deadline=None)
@given(
    affinity=st.lists(
        st.sampled_from([-1.7e308, -1e300, -1.0, -1e-300, 0.0, 1e-300, 1.0, 1e300, 1.7e308]),
        min_size=2,
        max_size=8,
    ),
    tau=st.sampled_from([1e-320, 1e-30, 1.0, 1e30, 1e308]),
)
@example([-1.7e308, -1.7e308, -1.7e308, -1.7e308, -1.7e308, -1e300, 1.7e308], 1e308)
def test_terms_are_ordered_near_the_limits_of_numbers(affinity, tau):
    term = tie_break(torch.tensor([affinity], dtype=torch.float64), tau)[0]
    assert ((term >= 0) & (term <= 0.5)).all()
    order = np.argsort(affinity, kind="stable")
    assert (np.diff(term.numpy()[order]) >= 0).all()
