"""Choose the shape of micro-batches, for cells by a short measurement."""

import math
import time
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, Literal

import torch
from torch import nn

from .batching import BatchLayout, PopulationAffinity, compare_populations
from .device import is_out_of_memory
from .follow import FollowedNetwork
from .probe import ProbeResult
from .truncation import TruncatedNetwork

# Batch sizes that are tried: on a CPU small batches stay in the caches, a GPU needs many images to
# be busy. Vectors are cheap, so that the overhead of a call weighs more, unless a further one takes
# CHEAP_SECONDS or more.
CPU_IMAGES, GPU_IMAGES, VECTORS = (64, 32, 16, 128, 256), (1024, 256, 4096), (1024, 256, 4096)
CHEAP_SECONDS = 5e-4

# Another layout than the first is chosen if it takes less than this share of the time, in the best
# of N_TRIALS trials, each of as many cells as take MEASURED_SECONDS.
MIN_SPEEDUP = 0.97
N_TRIALS = 4
MEASURED_SECONDS = 0.05

# Limit for all trials of a layer together: seconds, or if that is more, a share of the time that
# the training samples take to run through the network.
TRIAL_SECONDS, TRIAL_SHARE = 0.1, 0.5

# Batch sizes beyond this and beyond the number of training samples are not used.
LARGEST_NEEDED = 4096

# Batch size for samples on a CPU, of images and of vectors. Calls may have a single sample, and
# batches are filled up: of four images each takes at most a third more time than of many.
CPU_BATCH = (4, 256)

# network -> {key: layout}, so that a search over other parameters measures a network once.
_MEASURED: MutableMapping[nn.Module, dict[Any, BatchLayout]] = weakref.WeakKeyDictionary()


class Layouts:
    """The shapes of a map's micro-batches.

    Parameters
    ----------
    batch_size : "auto" or int
        Of a number, at most that of the training samples or 4,096 is taken, and nothing is
        measured.
    input_shape : tuple of int
        Shape of one sample.
    device : torch.device
    probed : ProbeResult, default=None
        The batches that the network takes, and its speed.
    n_samples : int, default=0
        Number of training samples, for the limit of the trials.

    Attributes
    ----------
    smallest : int
        The smallest batch that the network takes.
    of_samples : BatchLayout
        The layout of samples, of which there may be one or many.
    of_cells : dict of str to BatchLayout
        The layouts of populations, by layer.
    """

    def __init__(
        self,
        batch_size: int | Literal["auto"],
        input_shape: tuple[int, ...],
        device: torch.device,
        probed: ProbeResult | None = None,
        *,
        n_samples: int = 0,
    ) -> None:
        self.smallest = probed.smallest_batch if probed else 1
        self.of_cells: dict[str, BatchLayout] = {}
        self._seconds_per_sample = probed.seconds_per_sample if probed else 0.0
        self._max_seconds = max(TRIAL_SECONDS, TRIAL_SHARE * n_samples * self._seconds_per_sample)
        self._fixed = None
        if batch_size != "auto":
            is_exact, size = bool(probed and probed.is_exact), batch_size
            if probed and not is_exact:
                # Batches are filled up to their size, so that a larger one only costs time.
                size = min(batch_size, max(n_samples, LARGEST_NEEDED))
            self._fixed = BatchLayout(max(size, self.smallest), exact=is_exact)
        self._is_cheap = not probed or probed.seconds_per_further_sample < CHEAP_SECONDS
        # Token ids cost as much as images, other vectors do not.
        is_integer = bool(probed and probed.integer_input)
        self._is_vector = len(input_shape) == 1 and not is_integer and self._is_cheap
        self.run_on(device)

    def run_on(self, device: torch.device) -> None:
        """Choose the layout of samples on a device.

        Parameters
        ----------
        device : torch.device
        """
        size = CPU_BATCH[self._is_vector] if device.type == "cpu" else GPU_IMAGES[0]
        self.of_samples = self._fixed or BatchLayout(size)

    def choose(
        self,
        layer: str,
        affinity: PopulationAffinity,
        followed: FollowedNetwork,
        *,
        start: str | None,
        cell_shape: tuple[int, ...],
    ) -> BatchLayout:
        """Choose the layout of populations on their way to a layer, and keep it.

        Parameters
        ----------
        layer : str
        affinity : PopulationAffinity
        followed : FollowedNetwork
        start : str or None
            The layer in whose output space cells live.
        cell_shape : tuple of int

        Returns
        -------
        BatchLayout
        """
        if layer in self.of_cells:
            return self.of_cells[layer]
        layout = self._fixed
        if layout is None:
            network = followed.network
            module = followed.module
            known = {} if module is None else _MEASURED.setdefault(module, {})
            layout_key = layer, start, cell_shape, str(network.device), network.dtype
            if layout_key not in known:
                known[layout_key] = self._measure(layer, affinity, network, start, cell_shape)
            layout = known[layout_key]
        self.of_cells[layer] = layout
        return layout

    def _measure(
        self,
        layer: str,
        affinity: PopulationAffinity,
        network: TruncatedNetwork,
        start: str | None,
        cell_shape: tuple[int, ...],
    ) -> BatchLayout:
        cells = torch.zeros(2, *cell_shape, device=network.device, dtype=network.dtype)
        antigen = network(cells, (layer,), start)[layer][:1].reshape(1, -1)

        def run(cells: torch.Tensor, layout: BatchLayout) -> None:
            compare_populations(network, cells[None], antigen, layer, affinity, start, layout)

        return fastest_layout(
            run,
            cell_shape,
            device=network.device,
            dtype=network.dtype,
            max_seconds=self._max_seconds,
            seconds_per_sample=self._seconds_per_sample,
            is_cheap=self._is_cheap,
        )

    def __getstate__(self) -> dict[str, Any]:
        # Another machine has another speed.
        return vars(self) | {"_seconds_per_sample": 0.0, "_max_seconds": TRIAL_SECONDS}


def fastest_layout(
    run: Callable[[torch.Tensor, BatchLayout], object],
    shape: tuple[int, ...],
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_seconds: float = math.inf,
    seconds_per_sample: float = 0.0,
    is_cheap: bool = True,
) -> BatchLayout:
    """Choose the layout that takes the least time for blank cells.

    Parameters
    ----------
    run : callable
        Takes a tensor of shape (n_cells, *shape) and a layout.
    shape : tuple of int
        Shape of one cell.
    device : torch.device
    dtype : torch.dtype
    max_seconds : float, default=inf
        About how long all trials together may take; there are none if that is too short.
    seconds_per_sample : float, default=0
        An upper estimate of the time that one cell takes.
    is_cheap : bool, default=True
        Whether a further cell takes little time, as most vectors do.

    Returns
    -------
    BatchLayout
    """
    is_vector = len(shape) == 1 and is_cheap
    sizes = VECTORS if is_vector else CPU_IMAGES if device.type == "cpu" else GPU_IMAGES
    smallest = min(sizes)
    formats = (False, True) if len(shape) == 3 else (False,)
    # Three passes find the number of cells, the trials follow.
    if (3 + N_TRIALS * len(formats)) * smallest * seconds_per_sample > max_seconds:
        return BatchLayout(smallest)
    cell = torch.full((1, *shape), 0.5, device=device, dtype=dtype)

    def measure(n_cells: int, layout: BatchLayout) -> float:
        cells = cell.expand(n_cells, *shape)
        start = time.perf_counter()
        run(cells, layout)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    try:
        seconds = min(measure(smallest, BatchLayout(smallest)) for _ in range(2))
    except RuntimeError as error:
        if is_out_of_memory(error):
            return BatchLayout(1)
        raise
    n_cells = max(
        size for size in sizes if size * seconds <= smallest * MEASURED_SECONDS or size == smallest
    )
    layouts = [BatchLayout(size, last) for last in formats for size in sizes if size <= n_cells]
    times = dict.fromkeys(layouts, math.inf)
    # In turn, so that a disturbance affects all of them.
    for layout in N_TRIALS * layouts:
        try:
            times[layout] = min(times[layout], measure(n_cells, layout))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    best = min(layouts, key=lambda layout: times[layout])
    return best if times[best] < MIN_SPEEDUP * times[layouts[0]] else layouts[0]
