"""Affinity maturation: populations are bred toward their antigens (Algorithm 1 of the paper)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from .._blocks import Progress
from ..neighbors import ClassNeighbors
from .compiled import breed
from .domain import Domain
from .operators import (
    class_counts,
    cross_over,
    find_stand_ins,
    first_parent_share,
    leading_class,
    mean_affinity,
    mutate_,
    replace_non_finite,
    select_parents,
)
from .random import RandomStream

# Cells that are bred at a time on a CPU, in bytes, to stay in the caches between the operators.
CACHE_BYTES = 4 * 2**20


class CellBank:
    """The training samples in the space that populations live in.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_features), default=None
        On the device of the feature map.
    neighbors : ClassNeighbors, default=None
        An index that has the same samples in memory, which are then stored once; instead of
        ``cells``.
    """

    def __init__(
        self, cells: torch.Tensor | None = None, neighbors: ClassNeighbors | None = None
    ) -> None:
        self._cells, self._neighbors = cells, neighbors

    @property
    def cells(self) -> torch.Tensor:
        """All cells, (n, n_features); a copy where an index has them."""
        if self._cells is not None:
            return self._cells
        return self.take(torch.arange(len(self), device=self._index.index.device))

    @property
    def _index(self) -> ClassNeighbors:
        assert self._neighbors is not None
        return self._neighbors

    def __len__(self) -> int:
        return len(self._index.index) if self._cells is None else len(self._cells)

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """Return a copy of some cells.

        Parameters
        ----------
        index : torch.Tensor, int64
            Their positions among the training samples.

        Returns
        -------
        torch.Tensor of shape (*index.shape, n_features)
        """
        if self._cells is not None:
            return self._cells[index]
        return self._index.take(index.flatten()).view(*index.shape, -1)

    def shared_with(self, neighbors: ClassNeighbors) -> CellBank:
        """Return a bank without cells of its own, if an index has the same samples.

        Parameters
        ----------
        neighbors : ClassNeighbors
            Of as many samples.

        Returns
        -------
        CellBank
            This one if the index has others, or not in memory, or there is an index already.
        """
        if self._cells is None or not neighbors.holds(self._cells):
            return self
        return CellBank(neighbors=neighbors)

    def with_index(self, old: ClassNeighbors, new: ClassNeighbors) -> CellBank:
        """Return the bank with another index instead of the old one, if it uses that."""
        return CellBank(neighbors=new) if self._neighbors is old else self

    def __getstate__(self) -> dict[str, Any]:
        # Plain arrays load where there is no GPU, and joblib can map them from disk.
        cells = None if self._cells is None else self._cells.cpu().numpy()
        return {"cells": cells, "neighbors": self._neighbors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._neighbors, self._cells = state["neighbors"], None
        if state["cells"] is not None:
            with warnings.catch_warnings():
                # Cells that are mapped from disk stay there; torch warns that they are read-only.
                warnings.simplefilter("ignore", UserWarning)
                self._cells = torch.from_numpy(np.asarray(state["cells"]))

    def to(self, device: torch.device) -> CellBank:
        """Return the bank on a device."""
        if self._cells is not None:
            return CellBank(self._cells.to(device))
        self._index.move_to(device)
        return self


@dataclass(frozen=True)
class Schedule:
    """How a population matures: the parameters of Algorithm 1.

    Attributes
    ----------
    population_size : int
        Number of cells (T).
    generations : int
        Maximum number of generations (G).
    selection : {"global", "class_balanced"}
    crossover : {"affinity", "uniform"}
    n_plasma, n_memory : int
        Number of cells of highest affinity that vote, and that may be remembered.
    early_stopping : bool
        Whether a sample is bred no further once its vote is settled.
    compile : bool
        Whether crossover and mutation run in one compiled function.
    """

    population_size: int
    generations: int
    selection: str
    crossover: str
    n_plasma: int
    n_memory: int
    early_stopping: bool
    compile: bool = False


@dataclass(frozen=True)
class Population:
    """The final populations of some samples, and how they came about.

    Attributes
    ----------
    cells : torch.Tensor of shape (n, n_cells, n_features), or None if not kept
    labels : torch.Tensor of shape (n, n_cells), int64
    affinity : torch.Tensor of shape (n, n_cells)
    affinity_curve : torch.Tensor of shape (n, generations + 1)
        Mean affinity; NaN after breeding has stopped. Of clones the first value alone.
    class_curve : torch.Tensor of shape (n, generations + 1, n_classes)
        Each class's share of the population; NaN likewise.
    n_generations : torch.Tensor of shape (n,), int64
        The last generation that was bred; -1 for clones that were not mutated.
    """

    cells: torch.Tensor | None
    labels: torch.Tensor
    affinity: torch.Tensor
    affinity_curve: torch.Tensor
    class_curve: torch.Tensor
    n_generations: torch.Tensor

    @classmethod
    def of_clones(
        cls,
        cells: torch.Tensor | None,
        labels: torch.Tensor,
        affinity: torch.Tensor,
        *,
        generations: int,
        n_classes: int,
    ) -> Population:
        """Return populations before the first generation, of clones that are not mutated.

        Parameters
        ----------
        cells : torch.Tensor of shape (n, n_cells, n_features), or None if not kept
        labels : torch.Tensor of shape (n, n_cells), int64
        affinity : torch.Tensor of shape (n, n_cells)
        generations : int
            Maximum number of generations, for the length of the curves.
        n_classes : int

        Returns
        -------
        Population
        """
        n, n_points = len(labels), generations + 1
        affinity_curve = affinity.new_full((n, n_points), torch.nan)
        class_curve = affinity.new_full((n, n_points, n_classes), torch.nan)
        affinity_curve[:, 0] = mean_affinity(affinity)
        class_curve[:, 0] = class_counts(labels, n_classes).to(affinity) / labels.shape[1]
        n_generations = labels.new_full((n,), -1)
        return cls(cells, labels, affinity, affinity_curve, class_curve, n_generations)

    def with_rows(self, rows: torch.Tensor, other: Population) -> Population:
        """Return the populations with those of some samples replaced.

        Parameters
        ----------
        rows : torch.Tensor of shape (m,), int64
        other : Population
            Of m samples.

        Returns
        -------
        Population
        """
        changed: dict[str, Any] = {}
        for name in (field.name for field in fields(self)):
            old = getattr(self, name)
            if old is not None:
                changed[name] = old.index_copy(0, rows, getattr(other, name))
        return replace(self, **changed)


def mature(
    cells: torch.Tensor,
    labels: torch.Tensor,
    antigens: torch.Tensor,
    *,
    affinities: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    stream: RandomStream,
    tau: float,
    settling_lead: float,
    schedule: Schedule,
    domain: Domain,
    n_classes: int,
    keep_cells: bool,
    progress: Progress | None = None,
) -> Population:
    """Breed populations toward their antigens (Algorithm 1 of Wang et al. 2021).

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_cells, n_features)
        The clones, not yet mutated; overwritten.
    labels : torch.Tensor of shape (n_cells,) or (n, n_cells), int64
        Their classes, in ascending order.
    antigens : torch.Tensor of shape (n, n_layer_features)
        The features that each sample's cells are bred toward.
    affinities : callable
        ``affinities(cells, antigens)``: the affinities (m, n_cells) of the populations (m, n_cells,
        n_features) of some samples.
    stream : RandomStream
        ``stream.draw(generation, cells)``: the uniform numbers ``"first"``, ``"second"`` and
        ``"cross"``, and the mutation's ``"steps"``.
    tau : float
    settling_lead : float
        With early stopping, a sample is bred no further once its plasma is unanimous and the best
        cell leads those of all other classes by more than this, or once its plasma is unanimous
        for the same class in two generations running.
    schedule : Schedule
    domain : Domain
    n_classes : int
    keep_cells : bool
        Whether the final cells are returned.
    progress : Progress, default=None
        Counts the populations that are bred no further.

    Returns
    -------
    Population
        A cell without an affinity, which is NaN or minus infinity, is replaced by the best one.
    """
    n_rows, n_cells, _ = cells.shape
    step = n_rows
    if cells.device.type == "cpu":
        step = max(1, CACHE_BYTES // (n_cells * cells[0, 0].nbytes))
    n_points = schedule.generations + 1
    affinity_curve = cells.new_full((n_rows, n_points), torch.nan)
    class_curve = cells.new_full((n_rows, n_points, n_classes), torch.nan)
    n_generations = torch.full((n_rows,), schedule.generations, device=cells.device)
    final_cells = torch.empty_like(cells) if keep_cells else None
    final_affinity = cells.new_empty(n_rows, n_cells)
    final_labels = labels.new_empty(n_rows, n_cells)

    rows = torch.arange(n_rows, device=cells.device)
    labels = labels.expand(n_rows, n_cells)
    affinity = final_affinity
    leader = torch.full_like(rows, -1)
    children, parents = cells, cells[:0]
    for generation in range(n_points):
        uniforms = stream.draw(generation, children)
        if generation > 0:
            first, second = select_parents(
                affinity, labels, uniforms, tau, n_classes=n_classes, selection=schedule.selection
            )
            q = first_parent_share(affinity, first, second, tau, schedule.crossover)
            labels = labels.gather(1, first)
            spare = torch.empty_like(children) if generation == 1 else parents
            parents, children = children, spare
        measured = []
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            bred = children[part]
            if generation == 0:
                mutate_(bred, uniforms["steps"], domain)
            else:
                chosen = parents[part], first[part], second[part], q[part], uniforms["cross"]
                if schedule.compile:
                    breed(*chosen, uniforms["steps"], domain, out=bred)
                else:
                    mutate_(cross_over(*chosen, out=bred), uniforms["steps"], domain)
            measured.append(affinities(bred, antigens.index_select(0, rows[part])))
        affinity = replace_non_finite(torch.cat(measured))
        count = class_counts(labels, n_classes)
        class_curve[:, generation].index_copy_(0, rows, count.to(affinity) / n_cells)
        affinity_curve[:, generation].index_copy_(0, rows, mean_affinity(affinity))

        leaving, staying = torch.arange(len(rows), device=rows.device), None
        if generation < schedule.generations:
            if not schedule.early_stopping:
                continue
            previous = leader
            leader, lead = leading_class(affinity, labels, schedule.n_plasma)
            done = (leader >= 0) & ((leader == previous) | (lead > settling_lead))
            # The only place where the host waits for the device, once between two generations.
            done = done.cpu()
            if not done.any():
                continue
            leaving, staying = (d.nonzero()[:, 0].to(rows.device) for d in (done, ~done))
        if progress is not None:
            progress.add_populations(len(leaving))
        left = rows.index_select(0, leaving)
        n_generations.index_fill_(0, left, generation)
        final = affinity.index_select(0, leaving)
        source = find_stand_ins(final)
        final_affinity.index_copy_(0, left, final.gather(1, source))
        final_labels.index_copy_(0, left, labels.index_select(0, leaving).gather(1, source))
        if final_cells is not None:
            places = (leaving[:, None] * n_cells + source).flatten()
            kept = children.flatten(0, 1).index_select(0, places)
            final_cells.index_copy_(0, left, kept.view(len(leaving), n_cells, -1))
        if staying is None or len(staying) == 0:
            break
        rows, leader = rows.index_select(0, staying), leader.index_select(0, staying)
        affinity, labels = affinity.index_select(0, staying), labels.index_select(0, staying)
        children = children.index_select(0, staying)
        parents = parents[: len(staying)]
    return Population(
        final_cells, final_labels, final_affinity, affinity_curve, class_curve, n_generations
    )
