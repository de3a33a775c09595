"""Random numbers as a function of (seed, layer, generation), shared by all rows."""

import numpy as np
import torch
from sklearn.utils import check_random_state


def draw_seed(random_state):
    """Draw the seed that a fitted estimator keeps.

    Parameters
    ----------
    random_state : None, int or numpy.random.RandomState

    Returns
    -------
    int
    """
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def generation_uniforms(seed, layer, generation, n_cells, n_features):
    """Draw the uniform numbers that one generation of one layer uses.

    They are made on the host in float32, so that every device and both dtypes get the same ones.

    Parameters
    ----------
    seed : int
    layer : int
        Position of the layer among the estimator's layers.
    generation : int
        0 for the expansion.
    n_cells, n_features : int

    Returns
    -------
    dict of str to torch.Tensor of dtype float32
        ``"first"`` and ``"second"`` of shape (n_cells,), for the choice of parents; ``"cross"``
        and ``"mutate"`` of shape (n_cells, n_features), one number an element. All in [0, 1).
    """
    rng = np.random.default_rng([seed, layer, generation])
    shapes = {
        "first": n_cells,
        "second": n_cells,
        "cross": (n_cells, n_features),
        "mutate": (n_cells, n_features),
    }
    return {
        name: torch.from_numpy(rng.random(shape, dtype=np.float32))
        for name, shape in shapes.items()
    }
