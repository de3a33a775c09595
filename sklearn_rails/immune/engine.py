"""The engine that ``predict`` runs."""

from __future__ import annotations

import functools
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
    halve_until_it_fits,
    map_blocks,
    memory_budget,
)
from ..features import FeatureMap
from .consensus import normalize_votes
from .gates import Screening
from .layer import Flock, ResponseLayer
from .memory import MemoryBank
from .response import LAYER_FIELDS, ImmuneResponse

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

        def score(block: slice) -> list[NDArray[Any]]:
            flocks, screening = self.screen(X[block], None if alarms is None else alarms[block])
            scores = self._combine(screening.votes, screening.ties)
            bred = screening.bred.nonzero()[:, 0]
            if len(bred) < len(scores):
                progress.add_samples(len(scores) - len(bred))
                flocks = [flock.take(bred) for flock in flocks]
            for part in self._population_blocks(len(bred), n_jobs):
                for done, values in self._halve_until_it_fits(
                    lambda part: self._vote(flocks, part, progress), part
                ):
                    scores[bred[done].cpu().numpy()] = values
                progress.add_samples(part.stop - part.start)
            return [scores]

        self._check_backend(n_jobs)
        with Progress(len(X), len(self.layers), verbose) as progress:
            return self._map_blocks(score, len(X), n_jobs=n_jobs)[0]

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

        def respond(block: slice) -> list[NDArray[Any]]:
            n_rows = block.stop - block.start
            flocks, screening = self.screen(X[block], None if alarms is None else alarms[block])
            whole: list[NDArray[Any]] = []
            for part in self._population_blocks(n_rows, n_jobs):
                for done, arrays in self._halve_until_it_fits(
                    lambda part: self._respond(flocks, part, classes, progress), part
                ):
                    whole = whole or [np.empty((n_rows, *a.shape[1:]), a.dtype) for a in arrays]
                    for array, values in zip(whole, arrays, strict=True):
                        array[done] = values
                progress.add_samples(part.stop - part.start)
            bred = screening.bred.cpu().numpy()[:, None]
            kept = self._combine(screening.votes, screening.ties)
            whole[0] = np.where(bred, whole[0], kept)
            return whole if screening.p_values is None else [*whole, screening.p_values]

        self._check_backend(n_jobs)
        with Progress(len(X), len(self.layers), verbose) as progress:
            scores, *arrays = self._map_blocks(respond, len(X), n_jobs=n_jobs)
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

        arrays = self._map_blocks(flock, len(X))
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

    def without_compiling(self) -> ImmuneEngine:
        """Return an engine that gives the same answers and starts no compiler.

        Returns
        -------
        ImmuneEngine
            With the same indexes, memory and random numbers.
        """
        return replace(
            self,
            layers=tuple(
                replace(layer, schedule=replace(layer.schedule, compile=False))
                for layer in self.layers
            ),
        )

    def on_disk(self) -> ImmuneEngine:
        """Return the engine with its indexes in temporary files, where there is room.

        Returns
        -------
        ImmuneEngine
            This one stays as it is.
        """
        bank, layers = self.layers[0].bank, []
        for layer in self.layers:
            neighbors = layer.neighbors.on_disk()
            bank = bank.with_index(layer.neighbors, neighbors)
            layers.append(replace(layer, neighbors=neighbors))
        return replace(self, layers=tuple(replace(layer, bank=bank) for layer in layers))

    @property
    def _map_blocks(self) -> Callable[..., list[NDArray[Any]]]:
        features = self.features
        return functools.partial(map_blocks, row_bytes=features.row_bytes, device=features.device)

    def _check_backend(self, n_jobs: int | None) -> None:
        backend, _ = get_active_backend(prefer="threads")
        if effective_n_jobs(n_jobs) > 1 and not getattr(backend, "supports_sharedmem", False):
            self.features.warn_once(
                "backend",
                "n_jobs runs threads of this process, which share the network and the neighbours: "
                f"the joblib backend {type(backend).__name__} is not used. To predict on several "
                "machines, use sklearn_rails.distributed.predict.",
            )

    def _population_blocks(self, n_samples: int, n_jobs: int | None) -> list[slice]:
        """Split samples into blocks whose populations fit into memory."""
        features = self.features
        n_bytes = memory_budget(features.device) // (POPULATIONS_HELD * effective_n_jobs(n_jobs))
        if features.device.type == "cpu":
            n_bytes = min(n_bytes, CPU_BYTES)
        row_bytes = self.layers[0].schedule.population_size * features.cell_bytes
        step = max(1, n_bytes // row_bytes)
        return [slice(i, min(i + step, n_samples)) for i in range(0, n_samples, step)]

    @property
    def _halve_until_it_fits(self) -> Callable[..., list[tuple[slice, Any]]]:
        return functools.partial(
            halve_until_it_fits,
            advice="The population of a single sample does not fit into the memory of "
            f"{self.features.device}. Use a smaller population_size, fewer generations, a "
            "start_layer with fewer features, or device='cpu'.",
        )

    def _vote(self, flocks: list[Flock], part: slice, progress: Progress) -> NDArray[np.float64]:
        votes: Any = 0
        ties: Any = 0
        for layer, flock in zip(self.layers, flocks, strict=True):
            is_whole = part.stop - part.start == len(flock.antigens)
            some = flock if is_whole else flock.take(part)
            response = layer.respond(some, keep_cells=False, progress=progress)
            votes, ties = votes + response.votes, ties + response.ties
        return self._combine(votes, ties)

    def _respond(
        self, flocks: list[Flock], part: slice, classes: NDArray[Any], progress: Progress
    ) -> list[NDArray[Any]]:
        votes: Any = 0
        ties: Any = 0
        found: list[NDArray[Any]] = []
        for layer, flock in zip(self.layers, flocks, strict=True):
            response, arrays = layer.respond_arrays(flock.take(part), classes, progress)
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
    """Move the cells of loaded layers to the device of their network, one copy for all."""
    bank = layers[0].bank.to(device)
    domain = layers[0].domain.on(bank.take(torch.zeros(1, dtype=torch.int64)))
    return tuple(replace(layer, bank=bank, domain=domain) for layer in layers)
