"""Push rows and cells through a network in micro-batches of one fixed shape."""

import math
import time
from dataclasses import dataclass, replace

import torch

from .device import is_out_of_memory

# Sizes that are tried: on a CPU small batches stay in the caches, a GPU wants to be filled. Vectors
# cost little each, so that the call itself weighs more.
CPU_IMAGES, GPU_IMAGES, VECTORS = (64, 32, 128, 256), (1024, 256, 4096), (1024, 256, 4096)

# Another layout than the first is chosen if it takes less than this share of the time, in the best
# of so many trials, each of as many rows as can be had in so many seconds.
CLEARLY = 0.97
N_TRIALS = 4
TRIAL_SECONDS = 0.05

# Images, and vectors, that go through the network together on a CPU where a single one may be asked
# for.
CPU_ROWS = (16, 256)


@dataclass(frozen=True)
class Layout:
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

    def store(self, batch):
        """Give a batch in the layout's memory format.

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


def rows_layout(shape, device, *, is_vector=True):
    """Choose the layout for rows, of which there may be one or many.

    Parameters
    ----------
    shape : tuple of int
        Shape of one row.
    device : torch.device
    is_vector : bool, default=True
        Whether a row of one dimension is a plain vector, which costs little.

    Returns
    -------
    Layout
    """
    if device.type != "cpu":
        return Layout(GPU_IMAGES[0])
    return Layout(CPU_ROWS[len(shape) == 1 and is_vector])


def fastest_layout(run, shape, *, device, dtype, max_seconds=math.inf, seconds_per_row=0.0):
    """Try layouts on blank rows and choose by the time that they take.

    Parameters
    ----------
    run : callable
        Takes a tensor of shape (n_rows, *shape) and a layout.
    shape : tuple of int
        Shape of one row.
    device : torch.device
    dtype : torch.dtype
    max_seconds : float, default=inf
        About how long all trials together may take; without time for them there are none.
    seconds_per_row : float, default=0
        An upper estimate of the time that one row takes.

    Returns
    -------
    Layout
    """
    sizes = VECTORS if len(shape) == 1 else CPU_IMAGES if device.type == "cpu" else GPU_IMAGES
    smallest = min(sizes)
    formats = (False, True) if len(shape) == 3 else (False,)
    # Three passes find the number of rows, the trials follow.
    if (3 + N_TRIALS * len(formats)) * smallest * seconds_per_row > max_seconds:
        return Layout(smallest)
    row = torch.full((1, *shape), 0.5, device=device, dtype=dtype)

    def measure(n_rows, layout):
        rows = row.expand(n_rows, *shape)
        start = time.perf_counter()
        run(rows, layout)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    try:
        seconds = min(measure(smallest, Layout(smallest)) for _ in range(2))
    except RuntimeError as error:
        if is_out_of_memory(error):
            return Layout(1)
        raise
    n_rows = max(
        size for size in sizes if size * seconds <= smallest * TRIAL_SECONDS or size == smallest
    )
    layouts = [Layout(size, last) for last in formats for size in sizes if size <= n_rows]
    times = dict.fromkeys(layouts, math.inf)
    # In turn, so that a disturbance meets all of them.
    for layout in N_TRIALS * layouts:
        try:
            times[layout] = min(times[layout], measure(n_rows, layout))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    best = min(layouts, key=times.get)
    return best if times[best] < CLEARLY * times[layouts[0]] else layouts[0]


def halve_until_it_fits(run, layout, *, smallest=1):
    """Run with a layout, and with half its batch size as long as memory is too small.

    Parameters
    ----------
    run : callable
        Takes a layout.
    layout : Layout
    smallest : int, default=1
        The smallest batch that the network takes.

    Returns
    -------
    result : object
        What ``run`` gives.
    layout : Layout
        The layout that fitted.

    Raises
    ------
    MemoryError
        If the smallest batch does not fit.
    """
    while True:
        try:
            return run(layout), layout
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if layout.exact or layout.batch_size <= smallest:
                raise no_room_for_a_row(error) from error
            layout = replace(layout, batch_size=max(smallest, layout.batch_size // 2))


def no_room_for_a_row(error):
    """Explain that memory is too small for the network.

    Parameters
    ----------
    error : Exception

    Returns
    -------
    MemoryError
    """
    return MemoryError(
        "Memory is too small for a single sample to pass through the network: "
        f"{error} Free memory, use device='cpu', a smaller batch_size, or an earlier layer."
    )


def iterate_batches(x, layout):
    """Cut rows into micro-batches, the last one filled up with copies of its first row.

    A convolution's last bits depend on the shape of its batch, and selection amplifies them: with
    one shape for all, a row's features do not depend on the rows around it.

    Parameters
    ----------
    x : torch.Tensor of shape (n, ...)
    layout : Layout

    Yields
    ------
    rows : slice
        Where the micro-batch's rows stand in ``x``.
    batch : torch.Tensor of shape (batch_size, ...)
        The rows; only the first ``rows.stop - rows.start`` count.
    """
    size = layout.batch_size
    for start in range(0, len(x), size):
        batch = x[start : start + size]
        yield slice(start, start + len(batch)), layout.store(fill_up(batch, size))


def fill_up(batch, size):
    """Fill a micro-batch up with copies of its first member.

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


def tile_shape(n_cells, batch_size, *, exact=False):
    """Cut populations so that no micro-batch holds parts of two rows, nor wastes much.

    Parameters
    ----------
    n_cells : int
        Cells of one row.
    batch_size : int
        About how many cells a micro-batch is to hold.
    exact : bool, default=False
        Whether it may hold no more than these.

    Returns
    -------
    n_rows, n_columns : int
        Rows and cells of each that go through the network together.
    """
    if n_cells <= batch_size:
        return batch_size // n_cells, n_cells
    if exact:
        return 1, batch_size
    # Of the sizes near the one that is asked for, the one that fills the fewest places with blanks.
    nearest = round(n_cells / batch_size)
    numbers = range(math.ceil(n_cells / (3 * batch_size // 2)), round(1.5 * nearest) + 1)
    columns = {number: -(-n_cells // number) for number in numbers}
    best = min(numbers, key=lambda m: (m * columns[m] - n_cells, abs(m - nearest)))
    return 1, columns[best]


def iterate_tiles(cells, batch_size, *, exact=False):
    """Cut populations into tiles of one shape.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_cells, n_features)
    batch_size : int
    exact : bool, default=False
        As :func:`tile_shape` takes them.

    Yields
    ------
    rows, columns : slice
        Where the tile stands in ``cells``.
    tile : torch.Tensor of shape (n_rows, n_columns, n_features)
        The cells, zeros where it reaches beyond the last.
    """
    n, n_cells, n_features = cells.shape
    n_rows, n_columns = tile_shape(n_cells, batch_size, exact=exact)
    for top in range(0, n, n_rows):
        for left in range(0, n_cells, n_columns):
            rows = slice(top, min(top + n_rows, n))
            columns = slice(left, min(left + n_columns, n_cells))
            tile = cells[rows, columns]
            if tile.shape[:2] != (n_rows, n_columns):
                padded = cells.new_zeros(n_rows, n_columns, n_features)
                padded[: tile.shape[0], : tile.shape[1]] = tile
                tile = padded
            yield rows, columns, tile
