"""What ``fit`` does: index training samples, resolve parameters, and calibrate the gate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .._blocks import for_blocks
from .._conformal import sample_rows
from ..features import FeatureMap
from ..neighbors import ClassNeighbors, resolve_affinity
from ..neighbors.leave_one_out import scale_of_affinity
from .compiled import prepare_compiler
from .domain import find_domain
from .engine import ImmuneEngine
from .layer import ResponseLayer
from .maturation import CellBank, Schedule
from .memory import MemoryBank
from .random import Mutation, RandomStream

# Number of training samples by which the scale of affinities is measured.
SCALE_SAMPLES = 256

# With early stopping, a class settles the vote if it leads by so many times the scale of
# affinities, or tau if that is more: a rival then has at most exp(-4), 2 %, of its best cell's
# chance to become a parent. On MNIST and SVHN, clean and attacked, a lead of 3 changed up to 1 %
# of the labels and a lead of 4 none (benchmarks/bench_passes.py).
SETTLING_LEAD = 4


def build_engine(
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
    verbose: int,
    previous: ImmuneEngine | None = None,
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
    n_neighbors, tau, clip, affinity, algorithm, memory_capacity, gate, n_jobs, verbose
        As :class:`~sklearn_rails.RAILSClassifier` takes them.
    previous : ImmuneEngine, default=None
        An engine of the same network, whose samples are the first of these: they are not run again
        where it keeps their features in full precision.

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
    old = None if previous is None or previous.layers[0].recompute else previous
    cells = _embed_cells(features, X, old)
    domain = find_domain(cells, clip)
    if schedule.compile:
        prepare_compiler(cells, schedule.population_size, domain.on(cells))
    found = {
        name: ClassNeighbors(affinity, algorithm, n_jobs).start(y, n_classes)
        for name in features.layers
    }
    with tqdm(total=len(y), desc="fit", unit="sample", disable=not verbose) as bar:
        n_old = 0 if old is None else len(old.layers[0].bank)
        for layer in () if old is None else old.layers:
            found[layer.name].add_index(layer.neighbors)
        bar.update(n_old)

        def add(block: slice) -> None:
            rows = slice(n_old + block.start, n_old + block.stop)
            for name, values in features(X[rows]).items():
                found[name].add(rows, values)
            bar.update(rows.stop - rows.start)

        for_blocks(add, len(y) - n_old, features.row_bytes, features.device)
    bank = CellBank(cells)
    for neighbors in found.values():
        bank = bank.shared_with(neighbors.build())
    layers = tuple(
        ResponseLayer(
            name,
            features,
            affinity,
            bank,
            neighbors,
            n_neighbors,
            n_classes,
            1.0,
            0.0,
            schedule,
            domain.on(cells),
            RandomStream(
                seed,
                number,
                (schedule.population_size, cells.shape[1]),
                mutation,
                domain.unit,
            ),
            MemoryBank(memory_capacity, n_classes, features.cell_shape),
        )
        for number, (name, neighbors) in enumerate(found.items())
    )
    layers = tuple(_scale(layer, None if isinstance(tau, str) else float(tau)) for layer in layers)
    return ImmuneEngine(features, layers, None if gate is None else gate.calibrate(layers, X, seed))


def _embed_cells(
    features: FeatureMap, X: NDArray[Any] | torch.Tensor, old: ImmuneEngine | None
) -> torch.Tensor:
    if old is None or features.start_layer is None:
        return features.embed_cells(X)
    known = old.layers[0].bank.cells.to(features.device)
    return torch.cat([known, features.embed_cells(X[len(known) :])])


def _scale(layer: ResponseLayer, tau: float | None) -> ResponseLayer:
    """Set what is in units of affinity by training samples that are left out of their neighbours.

    The scale is tau itself where there is none.
    """
    n_samples = len(layer.bank)
    chosen = torch.from_numpy(sample_rows(n_samples, SCALE_SAMPLES, rng=0)).to(
        layer.features.device
    )
    recompute = layer.recompute
    found = layer.neighbors.take(chosen) if recompute is None else recompute(chosen)
    scale = scale_of_affinity(layer.neighbors, chosen, found, layer.n_neighbors, recompute)
    own = scale if tau is None else tau
    return replace(layer, tau=own, settling_lead=SETTLING_LEAD * max(own, scale))
