"""Crossover and mutation in one pass over the cells, by a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from .domain import Domain


def breed(
    cells: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    q: torch.Tensor,
    uniforms: torch.Tensor,
    steps: torch.Tensor,
    domain: Domain,
    out: torch.Tensor,
) -> torch.Tensor:
    """Cross cells over and mutate the offspring, as the operators do one after the other.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_cells, n_features)
        The parents.
    first, second : torch.Tensor of shape (n, n_cells), int64
        The parents' positions.
    q : torch.Tensor of shape (n, n_cells)
        The probability that an element comes from the first parent.
    uniforms, steps : torch.Tensor of shape (n_cells, n_features)
        The random numbers of crossover, and the mutation.
    domain : Domain
    out : torch.Tensor of shape (n, n_cells, n_features)
        Where the result goes.

    Returns
    -------
    torch.Tensor of shape (n, n_cells, n_features)
        ``out``.
    """
    with torch.no_grad():
        _compiled()(cells, first, second, q, uniforms, steps, domain.low, domain.high, out)
    return out


def prepare_compiler(cells: torch.Tensor, n_cells: int, domain: Domain) -> None:
    """Compile for populations of some cells, one and several at a time.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_features)
        Some training samples.
    n_cells : int
        Number of cells of a population.
    domain : Domain

    Raises
    ------
    ValueError
        If there is no compiler that works.
    """
    try:
        for n in (1, 3):
            parents = cells[:1].expand(n, n_cells, -1).contiguous()
            first = torch.zeros(n, n_cells, dtype=torch.int64, device=cells.device)
            q, uniforms = torch.zeros_like(parents[..., 0]), torch.zeros_like(parents[0])
            # No tensor twice: torch compiles that anew.
            second, steps, out = first.clone(), uniforms.clone(), torch.empty_like(parents)
            breed(parents, first, second, q, uniforms, steps, domain, out)
    except Exception as error:  # torch has many for this, most of them private
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            "compile=True needs a C++ compiler that torch.compile can use, such as g++; use "
            f"compile=False. {type(error).__name__}: {reason}"
        ) from error


@functools.cache
def _compiled() -> Callable[..., None]:
    return torch.compile(_breed, dynamic=True)


def _breed(
    cells: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    q: torch.Tensor,
    uniforms: torch.Tensor,
    steps: torch.Tensor,
    low: Any,
    high: Any,
    out: torch.Tensor,
) -> None:
    rows = torch.arange(len(cells), device=cells.device)[:, None]
    child = torch.where(q[..., None] > uniforms, cells[rows, first], cells[rows, second])
    child = child + steps
    out.copy_(child if low is None else child.clamp(low, high))
