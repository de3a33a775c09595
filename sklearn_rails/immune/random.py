"""Random numbers as a function of (seed, layer, generation), shared by all samples."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_random_state

# Number of elements of cells whose random numbers are kept for the next block of samples. Each
# takes two numbers: 64 MiB in single precision.
KEPT_ELEMENTS = 8 * 2**20


def draw_seed(random_state: int | np.random.RandomState | None) -> int:
    """Draw the seed that a fitted estimator keeps.

    Parameters
    ----------
    random_state : None, int or numpy.random.RandomState

    Returns
    -------
    int
    """
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))


def generation_uniforms(
    seed: int, layer: int, generation: int, n_cells: int, n_features: int
) -> dict[str, torch.Tensor]:
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
        "first": (n_cells,),
        "second": (n_cells,),
        "cross": (n_cells, n_features),
        "mutate": (n_cells, n_features),
    }
    return {
        name: torch.from_numpy(rng.random(shape, dtype=np.float32))
        for name, shape in shapes.items()
    }


def mutation_steps(
    uniforms: torch.Tensor,
    rho: float,
    delta_min: float,
    delta_max: float,
    unit: torch.Tensor | float,
) -> torch.Tensor:
    """Turn uniform numbers into what mutation adds to each element.

    Parameters
    ----------
    uniforms : torch.Tensor of shape (n_cells, n_features)
    rho : float
        Probability that an element changes.
    delta_min, delta_max : float
        Smallest and largest size of a change.
    unit : torch.Tensor of shape (n_features,) or float
        What delta is counted in.

    Returns
    -------
    torch.Tensor of shape (n_cells, n_features)
        0 with probability 1 - rho, else plus or minus a number uniform in [delta_min, delta_max)
        units.
    """
    # Given u < rho, 2 u / rho is uniform in [0, 2): its whole part is the sign, the rest the size.
    v = uniforms * (2 / max(rho, torch.finfo(uniforms.dtype).tiny))
    size = delta_min + (delta_max - delta_min) * v.remainder(1)
    return torch.where(uniforms < rho, torch.where(v < 1, size, -size), 0.0) * unit


@dataclass(frozen=True)
class Mutation:
    """How mutation changes cells.

    Attributes
    ----------
    rho : float
        Probability that an element changes.
    delta_min, delta_max : float
        Smallest and largest size of a change, in units of the domain.
    """

    rho: float
    delta_min: float
    delta_max: float


class RandomStream:
    """The random numbers of one layer, the same for all samples of all calls.

    Parameters
    ----------
    seed : int
    layer : int
        Position of the layer among the estimator's layers.
    shape : (int, int)
        Number of cells in a population, and of elements in a cell.
    mutation : Mutation
    unit : ndarray of shape (n_features,) or float
        What the sizes of mutations are counted in.
    """

    def __init__(
        self,
        seed: int,
        layer: int,
        shape: tuple[int, int],
        mutation: Mutation,
        unit: NDArray[Any] | float,
    ) -> None:
        self.seed = seed
        self.layer = layer
        self.shape = shape
        self.mutation = mutation
        self.unit = unit
        self._keep()

    def _keep(self) -> None:
        size = max(1, KEPT_ELEMENTS // math.prod(self.shape))
        self._draw = functools.lru_cache(size)(
            functools.partial(
                _draw, self.seed, self.layer, self.shape, self.mutation, unit=self.unit
            )
        )

    def draw(self, generation: int, cells: torch.Tensor) -> dict[str, torch.Tensor]:
        """Draw the numbers of a generation.

        Parameters
        ----------
        generation : int
            0 for the expansion.
        cells : torch.Tensor
            Whose device and dtype the numbers get.

        Returns
        -------
        dict of str to torch.Tensor
            ``"first"``, ``"second"`` and ``"cross"`` of :func:`generation_uniforms`, and
            ``"steps"`` of :func:`mutation_steps`.
        """
        return self._draw(generation, cells.device, cells.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_draw"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._keep()


def _draw(
    seed: int,
    layer: int,
    shape: tuple[int, int],
    mutation: Mutation,
    generation: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    unit: NDArray[Any] | float,
) -> dict[str, torch.Tensor]:
    uniforms = generation_uniforms(seed, layer, generation, *shape)
    drawn = {name: u.to(device=device, dtype=dtype) for name, u in uniforms.items()}
    scale = (
        torch.as_tensor(unit, device=device, dtype=dtype) if isinstance(unit, np.ndarray) else unit
    )
    sizes = mutation.rho, mutation.delta_min, mutation.delta_max
    drawn["steps"] = mutation_steps(drawn.pop("mutate"), *sizes, scale)
    return drawn
