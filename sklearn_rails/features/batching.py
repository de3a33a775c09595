"""Run samples and populations through a network in micro-batches of one fixed shape."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from .device import explain_out_of_memory, is_out_of_memory
from .outputs import LayerError
from .truncation import TruncatedNetwork

Result = TypeVar("Result")

# What the error for a network that does not fit into memory says.
PASS_ADVICE = (
    "Memory is too small for a single sample to pass through the network. Free memory, use "
    "device='cpu', a smaller batch_size, or an earlier layer."
)


class PopulationAffinity(Protocol):
    """How well the features of cells match those of antigens (higher is closer).

    Called with antigens of shape (n, n_features) and the features of their cells, of shape
    (n, n_cells, n_features), which it may overwrite if it is told so. Returns (n, n_cells).
    """

    @property
    def permutation_invariant(self) -> bool:
        """Whether features may come in another order, the same one in both arguments."""

    def __call__(
        self,
        antigens: torch.Tensor,
        features: torch.Tensor,
        *,
        overwrite_features: bool = False,
    ) -> torch.Tensor:
        """Compute the affinity of each cell to its antigen."""


@dataclass(frozen=True)
class BatchLayout:
    """The shape of a micro-batch.

    Attributes
    ----------
    batch_size : int
    channels_last : bool
        Whether images are stored with the channels last.
    exact : bool
        Whether every micro-batch has exactly ``batch_size`` members, for networks that take
        batches of one size only.
    """

    batch_size: int
    channels_last: bool = False
    exact: bool = False

    def store(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a batch in the layout's memory format.

        Parameters
        ----------
        batch : torch.Tensor of shape (batch_size, ...)

        Returns
        -------
        torch.Tensor of shape (batch_size, ...)
        """
        if not self.channels_last:
            return batch
        # contiguous() would leave images of one channel as they are.
        stored = torch.empty_like(batch, memory_format=torch.channels_last)
        return stored.copy_(batch)


def halve_until_it_fits(
    run: Callable[[BatchLayout], Result], layout: BatchLayout, *, smallest: int = 1
) -> tuple[Result, BatchLayout]:
    """Run with a layout, and halve its batch size as long as memory is too small.

    Parameters
    ----------
    run : callable
        Takes a layout.
    layout : BatchLayout
    smallest : int, default=1
        The smallest batch that the network takes.

    Returns
    -------
    result : object
        What ``run`` returns.
    layout : BatchLayout
        The layout that fitted.

    Raises
    ------
    MemoryError
        If the smallest batch does not fit.
    """
    while not (layout.exact or layout.batch_size <= smallest):
        try:
            return run(layout), layout
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        layout = replace(layout, batch_size=max(smallest, layout.batch_size // 2))
    with explain_out_of_memory(PASS_ADVICE):
        return run(layout), layout


def iterate_batches(x: torch.Tensor, layout: BatchLayout) -> Iterator[tuple[slice, torch.Tensor]]:
    """Split samples into micro-batches, the last one filled up with copies of its first sample.

    A convolution's last bits depend on the shape of its batch, and selection amplifies them: with
    one shape for all, a sample's features do not depend on the samples around it.

    Parameters
    ----------
    x : torch.Tensor of shape (n, ...)
    layout : BatchLayout

    Yields
    ------
    block : slice
        Position of the micro-batch's samples in ``x``.
    batch : torch.Tensor of shape (batch_size, ...)
        The samples; those after the first ``block.stop - block.start`` are copies.
    """
    size = layout.batch_size
    for start in range(0, len(x), size):
        batch = x[start : start + size]
        yield slice(start, start + len(batch)), layout.store(fill_up(batch, size))


def fill_up(batch: torch.Tensor, size: int) -> torch.Tensor:
    """Fill up a micro-batch with copies of its first member.

    Parameters
    ----------
    batch : torch.Tensor of shape (n, ...)
    size : int

    Returns
    -------
    torch.Tensor of shape (max(n, size), ...)
    """
    if len(batch) >= size:
        return batch
    return torch.cat([batch, batch[:1].expand(size - len(batch), *batch.shape[1:])])


def tile_shape(n_cells: int, batch_size: int, *, exact: bool = False) -> tuple[int, int]:
    """Choose tiles of populations that hold whole populations or parts of one, and few blanks.

    Parameters
    ----------
    n_cells : int
        Number of cells of a population.
    batch_size : int
        Approximate number of cells in a micro-batch.
    exact : bool, default=False
        Whether that is the maximum number.

    Returns
    -------
    n_rows, n_columns : int
        Number of populations, and of cells of each, that run through the network together.
    """
    if exact:
        return (batch_size // n_cells, n_cells) if n_cells <= batch_size else (1, batch_size)
    if n_cells <= batch_size:
        return round(batch_size / n_cells), n_cells
    # Of the sizes near batch_size, the one with the fewest blanks.
    nearest = round(n_cells / batch_size)
    numbers = range(math.ceil(n_cells / (3 * batch_size // 2)), round(1.5 * nearest) + 1)
    columns = {number: -(-n_cells // number) for number in numbers}
    best = min(numbers, key=lambda m: (m * columns[m] - n_cells, abs(m - nearest)))
    return 1, columns[best]


def iterate_tiles(
    cells: torch.Tensor, batch_size: int, *, exact: bool = False
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Split populations into tiles of one shape.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_cells, ...)
    batch_size : int
    exact : bool, default=False
        As :func:`tile_shape` takes them.

    Yields
    ------
    rows, columns : slice
        Position of the tile in ``cells``.
    tile : torch.Tensor of shape (n_rows, n_columns, ...)
        The cells, and zeros beyond the last.
    """
    n, n_cells = cells.shape[:2]
    n_rows, n_columns = tile_shape(n_cells, batch_size, exact=exact)
    for top in range(0, n, n_rows):
        for left in range(0, n_cells, n_columns):
            rows = slice(top, min(top + n_rows, n))
            columns = slice(left, min(left + n_columns, n_cells))
            tile = cells[rows, columns]
            if tile.shape[:2] != (n_rows, n_columns):
                padded = cells.new_zeros(n_rows, n_columns, *cells.shape[2:])
                padded[: tile.shape[0], : tile.shape[1]] = tile
                tile = padded
            yield rows, columns, tile


def run_samples(
    network: TruncatedNetwork,
    x: torch.Tensor,
    layers: Sequence[str],
    start: str | None,
    layout: BatchLayout,
    smallest: int = 1,
) -> dict[str, torch.Tensor]:
    """Compute layers' features of samples.

    Parameters
    ----------
    network : TruncatedNetwork
    x : torch.Tensor of shape (n, ...)
        The network's inputs, or with ``start`` outputs of that layer.
    layers : sequence of str
    start : str or None
    layout : BatchLayout
        If memory is too small for it, its batch size is halved.
    smallest : int, default=1
        The smallest batch that the network takes.

    Returns
    -------
    dict of str to torch.Tensor of shape (n, n_layer_features)

    Raises
    ------
    MemoryError
        If the smallest batch does not fit, or the features of all samples do not.
    """
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def run(layout: BatchLayout) -> dict[str, torch.Tensor]:
        for batches in parts.values():
            batches.clear()
        for block, batch in iterate_batches(x, layout):
            n_samples = block.stop - block.start
            for name, output in network(batch, layers, start).items():
                parts[name].append(output[:n_samples].reshape(n_samples, -1))
        return {name: torch.cat(batches) for name, batches in parts.items()}

    try:
        return halve_until_it_fits(run, layout, smallest=smallest)[0]
    except MemoryError as error:
        if not any(parts.values()):
            raise
        advice = f"Memory is too small for the features of {len(x)} samples: pass fewer at a time."
        raise MemoryError(f"{advice} ({error.__cause__})") from error


def run_populations(
    network: TruncatedNetwork,
    cells: torch.Tensor,
    antigens: torch.Tensor,
    layer: str,
    affinity: PopulationAffinity,
    start: str | None,
    layout: BatchLayout,
    smallest: int = 1,
) -> tuple[torch.Tensor, BatchLayout]:
    """Run populations to a layer, and compute their affinity to antigens there.

    Parameters
    ----------
    network : TruncatedNetwork
    cells : torch.Tensor of shape (n, n_cells, ...)
        The network's inputs, or with ``start`` outputs of that layer.
    antigens : torch.Tensor of shape (n, n_layer_features)
    layer : str
    affinity : PopulationAffinity
        If it is invariant under permutations, features come in the order in which they are stored,
        which saves a copy.
    start, layout, smallest
        As :func:`run_samples` takes them.

    Returns
    -------
    affinity : torch.Tensor of shape (n, n_cells)
    layout : BatchLayout
        The layout that fitted into memory.

    Raises
    ------
    MemoryError
        If the smallest batch does not fit.
    """

    def run(layout: BatchLayout) -> torch.Tensor:
        return compare_populations(network, cells, antigens, layer, affinity, start, layout)

    return halve_until_it_fits(run, layout, smallest=smallest)


def compare_populations(
    network: TruncatedNetwork,
    cells: torch.Tensor,
    antigens: torch.Tensor,
    layer: str,
    affinity: PopulationAffinity,
    start: str | None,
    layout: BatchLayout,
) -> torch.Tensor:
    """Do what :func:`run_populations` does, with one layout, whether it fits into memory or not.

    Parameters
    ----------
    network, cells, antigens, layer, affinity, start, layout
        As :func:`run_populations` takes them.

    Returns
    -------
    torch.Tensor of shape (n, n_cells)
    """
    stored_antigens: dict[torch.Size, torch.Tensor] = {}

    def compare(tile: torch.Tensor, rows: slice, n_columns: int) -> torch.Tensor:
        batch = tile.flatten(0, 1)
        n_tile = len(batch)
        if layout.exact:
            batch = fill_up(batch, layout.batch_size)
        if layout.channels_last:
            batch = layout.store(batch)
        outputs = network(batch, (layer,), start)[layer][:n_tile]
        if outputs.numel() != n_tile * antigens.shape[1]:
            raise LayerError(
                f"layers={layer!r}: the network gives {outputs.numel() // n_tile} features for an "
                f"input in a batch of {len(batch)}, but {antigens.shape[1]} in another."
            )
        is_private = network.is_private_buffer(outputs, batch)
        own = antigens
        if affinity.permutation_invariant and outputs.is_contiguous(
            memory_format=torch.channels_last
        ):
            shape = outputs.shape[1:]
            if shape not in stored_antigens:
                stored_antigens[shape] = antigens.reshape(-1, *shape).movedim(1, 3).flatten(1)
            own = stored_antigens[shape]
            outputs = outputs.movedim(1, 3)
        own = own[rows]
        features = outputs.reshape(*tile.shape[:2], -1)[: len(own), :n_columns]
        return affinity(own, features, overwrite_features=is_private)

    compared = cells.new_empty(cells.shape[:2])
    for rows, columns, tile in iterate_tiles(cells, layout.batch_size, exact=layout.exact):
        # In a function, so that large tensors are freed before the next tile needs memory.
        compared[rows, columns] = compare(tile, rows, columns.stop - columns.start)
    return compared
