"""The engine that ``fit`` builds and ``predict`` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from joblib import effective_n_jobs
from joblib.parallel import get_active_backend
from numpy.typing import NDArray

from .._blocks import (
    Progress,
    block_slices,
    halve_until_it_fits,
    map_blocks,
    memory_budget,
)
from .._conformal import sample_rows
from ..features import FeatureMap
from ..neighbors import ClassNeighbors, resolve_affinity
from ..neighbors.leave_one_out import scale_of_affinity
from .consensus import normalize_votes
from .gates import Screening
from .layer import CellBank, Flock, ResponseLayer
from .maturation import Schedule
from .memory import MemoryBank
from .operators import find_domain
from .random import Mutation, RandomStream
from .response import LAYER_FIELDS, ImmuneResponse

# Number of training samples by which tau="scale" is set.
TAU_SAMPLES = 256

# Arrays of the populations' size that a generation holds at a time.
POPULATIONS_HELD = 6

# Populations that are bred together on a CPU, in bytes, small enough to stay in a cache between
# generations.
CPU_BYTES = 32 * 2**20


@dataclass(frozen=True, eq=False)
class ImmuneEngine:
    """The fitted state of RAILS, immutable: it holds no estimator, and no estimator changes it.

    Parameters
    ----------
    features : FeatureMap
        The map from samples to layers' features.
    layers : tuple of ResponseLayer
        The layers that vote.
    gate : None, Arbitration or Triage, default=None
        Which samples are bred; calibrated.

    See Also
    --------
    RAILSClassifier : Builds an engine in ``fit``, as ``engine_``.

    Examples
    --------
    >>> from sklearn_rails import RAILSClassifier
    >>> from sklearn_rails.datasets import load_digit_images
    >>> digits = load_digit_images()
    >>> rails = RAILSClassifier(random_state=0).fit(digits.X_train, digits.y_train)
    >>> rails.engine_.scores(digits.X_test[:1].reshape(1, -1)).round(1)
    array([[0.4, 0.1, 8.5, 0.4, 0. , 0.1, 0. , 0.1, 0.2, 0.4]])
    """

    features: FeatureMap
    layers: tuple[ResponseLayer, ...]
    gate: Any = None

    @classmethod
    def build(
        cls,
        features: FeatureMap,
        X: NDArray[Any] | torch.Tensor,
        y: NDArray[np.int64],
        *,
        n_classes: int,
        n_neighbors: int,
        schedule: Schedule,
        mutation: Mutation,
        tau: float | str,
        clip: object,
        affinity: Any,
        algorithm: Any,
        memory_capacity: int,
        gate: Any,
        seed: int,
        n_jobs: int | None,
    ) -> ImmuneEngine:
        """Index training samples, resolve ``tau`` and ``clip``, and calibrate the gate.

        Parameters
        ----------
        features : FeatureMap
            The map from samples to layers' features.
        X : ndarray or torch.Tensor of shape (n, n_features)
            The training samples.
        y : ndarray of shape (n,), int64
            Their classes, from 0.
        n_classes : int
            Number of classes.
        schedule : Schedule
            How populations mature.
        mutation : Mutation
            How mutation changes cells.
        seed : int
            Seed of the random numbers.
        n_neighbors, tau, clip, affinity, algorithm, memory_capacity, gate, n_jobs
            As :class:`~sklearn_rails.RAILSClassifier` takes them.

        Returns
        -------
        ImmuneEngine
            The engine.

        Raises
        ------
        ValueError
            If a parameter does not fit the samples.
        """
        affinity = resolve_affinity(affinity)
        for name in features.layers:
            features.choose_layout(name, affinity)
        bank = CellBank(features.embed_cells(X))
        domain = find_domain(bank.cells, clip)
        found = {
            name: ClassNeighbors(affinity, algorithm, n_jobs).start(y, n_classes)
            for name in features.layers
        }
        for block in block_slices(len(y), features.row_bytes, features.device):
            for name, values in features(X[block]).items():
                found[name].add(block, values)
        layers = tuple(
            ResponseLayer(
                name,
                features,
                affinity,
                bank,
                neighbors.build(),
                n_neighbors,
                n_classes,
                1.0 if isinstance(tau, str) else float(tau),
                schedule,
                domain.on(bank.cells),
                RandomStream(
                    seed,
                    number,
                    (schedule.population_size, bank.cells.shape[1]),
                    mutation,
                    domain.unit,
                ),
                MemoryBank(memory_capacity, n_classes, features.cell_shape),
            )
            for number, (name, neighbors) in enumerate(found.items())
        )
        if isinstance(tau, str):
            layers = _scale_tau(layers, X)
        return cls(features, layers, None if gate is None else gate.calibrate(layers, X, seed))

    @property
    def memory(self) -> dict[str, MemoryBank]:
        """The remembered cells of each layer."""
        return {layer.name: layer.memory for layer in self.layers}

    def scores(
        self,
        X: NDArray[Any] | torch.Tensor,
        *,
        alarms: NDArray[np.bool_] | None = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> NDArray[np.float64]:
        """Compute the votes of each class, with affinity as a tie-breaker.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
            Samples.
        alarms : ndarray of shape (n,), bool, default=None
            Which samples the threat scorer flags, for a gate that asks for it.
        n_jobs : int, default=None
            Number of threads.
        verbose : int, default=0
            1 shows a progress bar.

        Returns
        -------
        ndarray of shape (n, n_classes), float64
            The scores.
        """

        def score(block: slice, progress: Progress) -> list[NDArray[Any]]:
            flocks, screening = self.screen(X[block], None if alarms is None else alarms[block])
            scores = self._combine(screening.votes, screening.ties)
            bred = screening.bred.nonzero()[:, 0]
            progress.add_samples(len(scores) - len(bred))
            for part in self._population_blocks(len(bred), n_jobs):
                rows = bred[part]
                for done, values in self._fit_in_memory(
                    lambda p: self._vote([f.take(bred[p]) for f in flocks], progress), part
                ):
                    scores[bred[done].cpu().numpy()] = values
                progress.add_samples(len(rows))
            return [scores]

        return self._map(score, len(X), n_jobs, verbose)[0]

    def screen(
        self, X: NDArray[Any] | torch.Tensor, alarms: NDArray[np.bool_] | None
    ) -> tuple[list[Flock], Screening]:
        """Embed and flock a block of samples, and ask the gate which of them are bred.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
            Samples.
        alarms : ndarray of shape (n,), bool, or None
            Which samples the threat scorer flags.

        Returns
        -------
        flocks : list of Flock
            Of each layer.
        screening : Screening
            Which samples are bred, and the scores of the others.
        """
        names = self.features.layers
        if self.gate is not None and self.gate.needs_network:
            names = tuple(dict.fromkeys((*names, self.features.output)))
        found = self.features(X, names)
        flocks = [layer.flock(found[layer.name]) for layer in self.layers]
        if self.gate is not None:
            return flocks, self.gate.screen(self.layers, flocks, found, alarms)
        device = flocks[0].affinity.device
        votes = torch.zeros(len(X), self.layers[0].n_classes, dtype=torch.float64, device=device)
        return flocks, Screening(torch.ones(len(X), dtype=torch.bool, device=device), votes, votes)

    def respond(
        self,
        X: NDArray[Any] | torch.Tensor,
        classes: NDArray[Any],
        *,
        alarms: NDArray[np.bool_] | None = None,
        threat: NDArray[np.float64] | None = None,
        n_jobs: int | None = None,
        verbose: int = 0,
    ) -> ImmuneResponse:
        """Breed all samples, and return everything that the responses produced.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
            Samples.
        classes : ndarray of shape (n_classes,)
            The class labels.
        alarms : ndarray of shape (n,), bool, default=None
            Which samples the threat scorer flags, for a gate that asks for it.
        threat : ndarray of shape (n,), default=None
            The samples' threat scores.
        n_jobs : int, default=None
            Number of threads.
        verbose : int, default=0
            1 shows a progress bar.

        Returns
        -------
        ImmuneResponse
            Labels and probabilities are the gate's for samples that it does not breed.
        """
        keys = [(field, layer.name) for layer in self.layers for field in LAYER_FIELDS]
        has_p_values = self.gate is not None and self.gate.needs_network

        def respond(block: slice, progress: Progress) -> list[NDArray[Any]]:
            n_rows = block.stop - block.start
            flocks, screening = self.screen(X[block], None if alarms is None else alarms[block])
            whole: list[NDArray[Any]] = []
            for part in self._population_blocks(n_rows, n_jobs):
                for done, arrays in self._fit_in_memory(
                    lambda p: self._respond([f.take(p) for f in flocks], classes, progress), part
                ):
                    whole = whole or [np.empty((n_rows, *a.shape[1:]), a.dtype) for a in arrays]
                    for array, values in zip(whole, arrays, strict=True):
                        array[done] = values
                progress.add_samples(part.stop - part.start)
            bred = screening.bred.cpu().numpy()[:, None]
            kept = self._combine(screening.votes, screening.ties)
            whole[0] = np.where(bred, whole[0], kept)
            return whole if screening.p_values is None else [*whole, screening.p_values]

        scores, *arrays = self._map(respond, len(X), n_jobs, verbose)
        fields: dict[str, Any] = {field: {} for field in LAYER_FIELDS}
        for (field, name), array in zip(keys, arrays, strict=False):
            fields[field][name] = array
        n_generations = sum(int((n + 1).sum()) for n in fields["n_generations"].values())
        return ImmuneResponse(
            proba=normalize_votes(scores),
            labels=classes[scores.argmax(axis=1)],
            n_forward=self.layers[0].schedule.population_size * n_generations,
            p_values=arrays[-1] if has_p_values else None,
            threat=threat,
            **fields,
        )

    def kneighbors(
        self, X: NDArray[Any] | torch.Tensor
    ) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Find the flocked neighbours, as arrays on the host.

        Parameters
        ----------
        X : ndarray or torch.Tensor of shape (n, n_features)
            Samples.

        Returns
        -------
        list of (affinity, index)
            Of each layer, ndarrays of shape (n, n_classes, n_neighbors).
        """

        def flock(block: slice) -> list[NDArray[Any]]:
            found = self.features(X[block])
            flocks = [layer.flock(found[layer.name]) for layer in self.layers]
            return [a.cpu().numpy() for f in flocks for a in (f.affinity, f.index)]

        arrays = map_blocks(flock, len(X), self.features.row_bytes, self.features.device)
        return list(zip(arrays[::2], arrays[1::2], strict=True))

    def with_memory(self, memory: dict[str, MemoryBank]) -> ImmuneEngine:
        """Return the engine with other remembered cells in each layer.

        Parameters
        ----------
        memory : dict of str to MemoryBank
            The cells of each layer.

        Returns
        -------
        ImmuneEngine
            This one stays as it is.
        """
        layers = tuple(layer.with_memory(memory[layer.name]) for layer in self.layers)
        return replace(self, layers=layers)

    def with_seed(self, seed: int) -> ImmuneEngine:
        """Return the engine with the random numbers of another seed.

        Parameters
        ----------
        seed : int
            The seed.

        Returns
        -------
        ImmuneEngine
            This one stays as it is.
        """
        return replace(self, layers=tuple(layer.with_seed(seed) for layer in self.layers))

    def on_disk(self) -> ImmuneEngine:
        """Return the engine with its indexes in temporary files, where there is room.

        Returns
        -------
        ImmuneEngine
            This one stays as it is.
        """
        layers = (replace(layer, neighbors=layer.neighbors.on_disk()) for layer in self.layers)
        return replace(self, layers=tuple(layers))

    def _map(
        self, compute: Callable[..., list[NDArray[Any]]], n: int, n_jobs: int | None, verbose: int
    ) -> list[NDArray[Any]]:
        backend, _ = get_active_backend(prefer="threads")
        if effective_n_jobs(n_jobs) > 1 and not getattr(backend, "supports_sharedmem", False):
            self.features.warn_once(
                "backend",
                "n_jobs runs threads of this process, which share the network and the neighbours: "
                f"the joblib backend {type(backend).__name__} is not used. To predict on several "
                "machines, send the fitted estimator and parts of X to its workers.",
            )
        features = self.features
        with Progress(n, len(self.layers), verbose) as progress:
            return map_blocks(
                lambda block: compute(block, progress),
                n,
                features.row_bytes,
                features.device,
                n_jobs=n_jobs,
            )

    def _population_blocks(self, n_samples: int, n_jobs: int | None) -> list[slice]:
        """Split samples into blocks whose populations fit into memory."""
        cells = self.layers[0].bank.cells
        n_bytes = memory_budget(cells.device) // (POPULATIONS_HELD * effective_n_jobs(n_jobs))
        if cells.device.type == "cpu":
            n_bytes = min(n_bytes, CPU_BYTES)
        row_bytes = self.layers[0].schedule.population_size * cells[0].nbytes
        step = max(1, n_bytes // row_bytes)
        return [slice(i, min(i + step, n_samples)) for i in range(0, n_samples, step)]

    def _fit_in_memory(self, compute: Callable[[slice], Any], block: slice) -> Any:
        return halve_until_it_fits(
            compute,
            block,
            advice="The population of a single sample does not fit into the memory of "
            f"{self.features.device}. Use a smaller population_size, fewer generations, a "
            "start_layer with fewer features, or device='cpu'.",
        )

    def _vote(self, flocks: list[Flock], progress: Progress) -> NDArray[np.float64]:
        votes: Any = 0
        ties: Any = 0
        for layer, flock in zip(self.layers, flocks, strict=True):
            response = layer.respond(flock, keep_cells=False, progress=progress)
            votes, ties = votes + response.votes, ties + response.ties
        return self._combine(votes, ties)

    def _respond(
        self, flocks: list[Flock], classes: NDArray[Any], progress: Progress
    ) -> list[NDArray[Any]]:
        votes: Any = 0
        ties: Any = 0
        found: list[NDArray[Any]] = []
        for layer, flock in zip(self.layers, flocks, strict=True):
            response, arrays = layer.respond_arrays(flock, classes, progress)
            votes, ties = votes + response.votes, ties + response.ties
            found += [arrays[field] for field in LAYER_FIELDS]
        return [self._combine(votes, ties), *found]

    def _combine(self, votes: torch.Tensor, ties: torch.Tensor) -> NDArray[np.float64]:
        return (votes + ties / len(self.layers)).cpu().numpy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        device = state["features"].device
        state["layers"] = _move(state["layers"], device)
        vars(self).update(state)


def _move(layers: tuple[ResponseLayer, ...], device: torch.device) -> tuple[ResponseLayer, ...]:
    """Bring the cells of loaded layers to the device of their network, one copy for all."""
    bank = layers[0].bank.to(device)
    domain = layers[0].domain.on(bank.cells)
    return tuple(replace(layer, bank=bank, domain=domain) for layer in layers)


def _scale_tau(
    layers: tuple[ResponseLayer, ...], X: NDArray[Any] | torch.Tensor
) -> tuple[ResponseLayer, ...]:
    """Resolve tau="scale" in each layer, by training samples without themselves."""
    chosen = torch.from_numpy(sample_rows(len(X), TAU_SAMPLES, rng=0))
    features = layers[0].features
    found = features(X[chosen.tolist()])
    chosen = chosen.to(features.device)
    return tuple(
        replace(
            layer,
            tau=scale_of_affinity(
                layer.neighbors, chosen, found[layer.name], layer.n_neighbors, layer.recompute
            ),
        )
        for layer in layers
    )
