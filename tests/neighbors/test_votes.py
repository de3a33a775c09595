import numpy as np
import torch
from numpy.testing import assert_allclose, assert_array_equal

from sklearn_rails.neighbors import ClassNeighbors
from sklearn_rails.neighbors.votes import class_margin, neighbor_votes


def as_one_class(features):
    return ClassNeighbors().fit(features, np.zeros(len(features), dtype=np.int64), n_classes=1)


def test_votes_of_two_layers_by_hand():
    labels = np.array([0, 0, 1, 2])
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    layers = {"line": line, "mirror": -line}
    votes, tie_break = neighbor_votes(
        {"line": torch.tensor([[0.4], [6.0]]), "mirror": torch.tensor([[-0.4], [-6.0]])},
        {layer: as_one_class(features) for layer, features in layers.items()},
        labels,
        n_neighbors=3,
        n_classes=3,
    )
    assert_array_equal(votes, [[4, 2, 0], [2, 2, 2]])
    # 0.4: the nearest are 0.4 (class 0) and 2.6 (class 1, the third). 6: 1 (2), 3 (1), 5 (0).
    expected = [[2.6 / 3.0, 1 / 2, 0], [1 / 2, 5 / 8, 5 / 6]]
    assert_allclose(tie_break, expected, rtol=1e-6)


def test_training_samples_do_not_vote_on_themselves():
    labels = np.array([0, 1, 1, 0])
    line = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    votes, _ = neighbor_votes(
        {"line": line},
        {"line": as_one_class(line)},
        labels,
        n_neighbors=1,
        n_classes=2,
        self_index=np.arange(4),
    )
    assert_array_equal(votes, [[0, 1], [1, 0], [0, 1], [0, 1]])


def test_the_margin_compares_the_mean_affinity_of_the_label_with_the_best_of_the_others():
    none = -torch.inf
    flocked = torch.tensor([[[-1.0, -3.0], [-3.0, none], [none, none]]])
    margins = [class_margin(flocked, torch.tensor([label])).item() for label in range(3)]
    assert margins == [-1, 1, torch.inf]  # means of -2, -3, and none
