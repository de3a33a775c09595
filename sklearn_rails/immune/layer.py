"""The response of one layer: its index of training samples, memory, temperature and numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray

from .._blocks import Progress
from ..features import FeatureMap
from ..neighbors import Affinity, ClassNeighbors
from ..neighbors.index import merge_flocks
from .consensus import class_affinity, count_votes, rank_by_affinity, tie_break
from .domain import Domain
from .maturation import CellBank, Population, Schedule, mature
from .memory import MemoryBank
from .operators import check_alive, clone_neighbors, leading_class
from .random import RandomStream


@dataclass(frozen=True, eq=False)
class Flock:
    """The nearest examples of every class to some samples, in one layer.

    Attributes
    ----------
    antigens : torch.Tensor of shape (n, n_layer_features)
        The samples' features.
    affinity : torch.Tensor of shape (n, n_classes, n_neighbors)
        Highest first; minus infinity where a class has no more examples.
    index : torch.Tensor of shape (n, n_classes, n_neighbors), int64
        Positions among the training samples, and after their end among the remembered cells; -1
        where a class has no more examples.
    """

    antigens: torch.Tensor
    affinity: torch.Tensor
    index: torch.Tensor

    def take(self, rows: torch.Tensor | slice) -> Flock:
        """Return the flocks of some of the samples."""
        return Flock(self.antigens[rows], self.affinity[rows], self.index[rows])


@dataclass(frozen=True, eq=False)
class LayerResponse:
    """What one layer says about some samples.

    Attributes
    ----------
    votes, ties : torch.Tensor of shape (n, n_classes), float64
        Number of plasma cells of each class, and less than half a vote for its affinity.
    population : Population
    ranking : torch.Tensor of shape (n, n_cells), int64
        The cells by affinity, the best first.
    """

    votes: torch.Tensor
    ties: torch.Tensor
    population: Population
    ranking: torch.Tensor


@dataclass(frozen=True, eq=False)
class ResponseLayer:
    """One layer of an :class:`ImmuneEngine`, immutable.

    Parameters
    ----------
    name : str
        Name of the layer.
    features : FeatureMap
        The map from samples to layers' features.
    affinity : Affinity
        How features are compared.
    bank : CellBank
        The training samples as cells.
    neighbors : ClassNeighbors
        The index of the training samples.
    n_neighbors : int
        Number of examples of each class that are flocked (k).
    n_classes : int
        Number of classes.
    tau : float
        Temperature of selection, in units of the affinity.
    settling_lead : float
        With early stopping, the lead by which one class settles the vote, in units of the affinity.
    schedule : Schedule
        How populations mature.
    domain : Domain
        Where cells live.
    stream : RandomStream
        The random numbers, the same for all samples.
    memory : MemoryBank
        The remembered cells.
    remembered : ClassNeighbors, default=None
        The index of the remembered cells, if there are any.

    See Also
    --------
    ImmuneEngine : The layers of a fitted classifier.

    Examples
    --------
    >>> from sklearn_rails import RAILSClassifier
    >>> from sklearn_rails.datasets import load_digit_images
    >>> digits = load_digit_images()
    >>> rails = RAILSClassifier(random_state=0).fit(digits.X_train, digits.y_train)
    >>> layer = rails.engine_.layers[0]
    >>> found = rails.feature_map_(digits.X_test[:2].reshape(2, -1))
    >>> layer.flock(found[layer.name]).index.shape
    torch.Size([2, 10, 10])
    """

    name: str
    features: FeatureMap
    affinity: Affinity
    bank: CellBank
    neighbors: ClassNeighbors
    n_neighbors: int
    n_classes: int
    tau: float
    settling_lead: float
    schedule: Schedule
    domain: Domain
    stream: RandomStream
    memory: MemoryBank
    remembered: ClassNeighbors | None = None

    @property
    def recompute(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What computes the features of training samples that are kept in half precision."""
        return self._recompute if self.neighbors.needs_recompute else None

    def _recompute(self, index: torch.Tensor) -> torch.Tensor:
        return self.features.features_of_cells(self.bank.take(index), self.name)

    def flock(self, antigens: torch.Tensor) -> Flock:
        """Find the nearest examples of every class, remembered cells included.

        Parameters
        ----------
        antigens : torch.Tensor of shape (n, n_layer_features)
            The samples' features.

        Returns
        -------
        Flock
            The samples' neighbours.
        """
        sizes = self.neighbors.n_samples_
        if self.remembered is None:
            k = min(self.n_neighbors, int(sizes.max()))
            return Flock(antigens, *self.neighbors.kneighbors(antigens, k, self.recompute))
        # Remembered cells count towards k where a class has fewer samples.
        k = min(self.n_neighbors, int((sizes + self.remembered.n_samples_).max()))
        flock = self.neighbors.kneighbors(antigens, k, self.recompute)
        affinity, index = self.remembered.kneighbors(antigens, k)
        index = torch.where(index < 0, index, index + len(self.bank))
        return Flock(antigens, *merge_flocks(flock, (affinity, index), k))

    def take_cells(self, index: torch.Tensor) -> torch.Tensor:
        """Return training samples, or beyond these remembered cells, by their positions.

        Parameters
        ----------
        index : torch.Tensor, int64
            As in :class:`Flock`, from 0.

        Returns
        -------
        torch.Tensor of shape (..., n_features)
            A copy.
        """
        n_train = len(self.bank)
        cells = self.bank.take(index.clamp(max=n_train - 1))
        if self.remembered is not None:
            memory = self.features.to_device(self.memory.cells).flatten(1)
            beyond = index >= n_train
            cells[beyond] = memory[index[beyond] - n_train]
        return cells

    def respond(
        self, flock: Flock, *, keep_cells: bool, progress: Progress | None = None
    ) -> LayerResponse:
        """Expand and optimize populations from flocks, and let their plasma vote.

        Parameters
        ----------
        flock : Flock
            The samples' neighbours.
        keep_cells : bool
            Whether the final cells are returned.
        progress : Progress, default=None
            Counts the populations that are bred no further.

        Returns
        -------
        LayerResponse
            Votes, and the populations.

        Raises
        ------
        ValueError
            If no cell of a population has a finite affinity.
        """
        population = self._breed(flock, keep_cells=keep_cells, progress=progress)
        check_alive(population.affinity, self.name)
        ranking = rank_by_affinity(population.affinity, self.schedule.population_size)
        plasma = population.labels.gather(1, ranking[:, : self.schedule.n_plasma])
        best = class_affinity(population.affinity, population.labels, flock.affinity)
        votes = count_votes(plasma, self.n_classes)
        return LayerResponse(votes, tie_break(best, self.tau), population, ranking)

    def _breed(self, flock: Flock, *, keep_cells: bool, progress: Progress | None) -> Population:
        """Breed the samples whose vote the flock does not settle; the others keep their clones."""
        schedule = self.schedule
        parents, labels, affinity = clone_neighbors(
            flock.index, flock.affinity, schedule.population_size
        )
        antigens, settled = flock.antigens, None
        if schedule.early_stopping:
            leader, lead = leading_class(affinity, labels, schedule.n_plasma)
            done = (leader >= 0) & (lead > self.settling_lead)
            if bool(done.any()):
                settled = Population.of_clones(
                    self.take_cells(parents) if keep_cells else None,
                    labels,
                    affinity,
                    generations=schedule.generations,
                    n_classes=self.n_classes,
                )
                rows = (~done).nonzero()[:, 0]
                if progress is not None:
                    progress.add_populations(len(parents) - len(rows))
                if len(rows) == 0:
                    return settled
                parents, labels, antigens = parents[rows], labels[rows], antigens[rows]
        no_memory = self.remembered is None
        population = mature(
            self.bank.take(parents) if no_memory else self.take_cells(parents),
            labels,
            antigens,
            affinities=functools.partial(
                self.features.affinities, layer=self.name, affinity=self.affinity
            ),
            stream=self.stream,
            tau=self.tau,
            settling_lead=self.settling_lead,
            schedule=schedule,
            domain=self.domain,
            n_classes=self.n_classes,
            keep_cells=keep_cells,
            progress=progress,
        )
        return population if settled is None else settled.with_rows(rows, population)

    def with_memory(self, memory: MemoryBank) -> ResponseLayer:
        """Return the layer with other remembered cells.

        Parameters
        ----------
        memory : MemoryBank
            The cells.

        Returns
        -------
        ResponseLayer
            This one stays as it is.
        """
        remembered = None
        if len(memory):
            cells = self.features.to_device(memory.cells).flatten(1)
            features = self.features.features_of_cells(cells, self.name)
            remembered = ClassNeighbors(self.affinity).fit(features, memory.labels, self.n_classes)
        return replace(self, memory=memory, remembered=remembered)

    def with_seed(self, seed: int) -> ResponseLayer:
        """Return the layer with the random numbers of another seed.

        Parameters
        ----------
        seed : int
            The seed.

        Returns
        -------
        ResponseLayer
            This one stays as it is.
        """
        old = self.stream
        stream = RandomStream(seed, old.layer, old.shape, old.mutation, old.unit)
        return replace(self, stream=stream)

    def respond_arrays(
        self, flock: Flock, classes: NDArray[Any], progress: Progress | None = None
    ) -> tuple[LayerResponse, dict[str, NDArray[Any]]]:
        """Respond, and return everything that the response produced.

        Parameters
        ----------
        flock : Flock
            The samples' neighbours.
        classes : ndarray of shape (n_classes,)
            The class labels.
        progress : Progress, default=None
            Counts the populations that are bred no further.

        Returns
        -------
        response : LayerResponse
            Votes, and the populations.
        arrays : dict of str to ndarray
            The entries of this layer in the fields of :class:`ImmuneResponse`.
        """
        response = self.respond(flock, keep_cells=True, progress=progress)
        population, arrays = response.population, {}
        rows = torch.arange(len(flock.antigens), device=flock.antigens.device)[:, None]
        for kind, size in (("plasma", self.schedule.n_plasma), ("memory", self.schedule.n_memory)):
            best = response.ranking[:, :size]
            assert population.cells is not None
            cells = population.cells[rows, best].unflatten(2, self.features.cell_shape)
            arrays[kind] = cells.cpu().numpy()
            arrays[f"{kind}_labels"] = classes[population.labels.gather(1, best).cpu().numpy()]
            arrays[f"{kind}_affinity"] = population.affinity.gather(1, best).cpu().numpy()
        for curve in ("affinity_curve", "class_curve", "n_generations"):
            arrays[curve] = getattr(population, curve).cpu().numpy()
        return response, arrays
