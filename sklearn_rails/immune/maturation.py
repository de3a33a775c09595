"""Expansion and optimization: cells are cloned, selected, crossed over and mutated.

Every function is pure: random numbers come in as arguments, uniform in [0, 1) and shared by all
rows, so that a row's answer is a function of the row. Populations are kept sorted by class: a
class is a slice, and one cumulative sum serves the choice of both parents.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import pad

from ..neighbors.affinity import replace_non_finite
from .consensus import unanimous_class

# On a CPU cells of so many bytes are bred at a time, to stay in the caches between the operators.
CACHE_BYTES = 4 * 2**20

# Times this, a number in double precision is the next smaller one, or the one after that.
BELOW_ONE = 1 - 2**-53


@dataclass(frozen=True)
class Domain:
    """Where cells live and how far a mutation moves them.

    Attributes
    ----------
    unit : array of shape (n_features,) or float
        What delta is counted in: each feature's range, or 1.
    low, high : array of shape (n_features,), float or None
        The bounds that cells are clipped to.
    """

    unit: np.ndarray | torch.Tensor | float
    low: np.ndarray | torch.Tensor | float | None
    high: np.ndarray | torch.Tensor | float | None

    def on(self, cells):
        """Give the domain as tensors beside some cells.

        Parameters
        ----------
        cells : torch.Tensor

        Returns
        -------
        Domain
        """
        return Domain(
            *(
                torch.as_tensor(v, device=cells.device, dtype=cells.dtype)
                if isinstance(v, np.ndarray)
                else v
                for v in (self.unit, self.low, self.high)
            )
        )


def find_domain(cells, clip):
    """Find where cells live: the paper's [0, 1], or each feature's range.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_features)
        The training data, in the cells' space.
    clip : "auto", None or pair of float

    Returns
    -------
    Domain

    Raises
    ------
    ValueError
        If ``clip`` is none of these, or a feature's range overflows.
    """
    low, high = cells.amin(dim=0), cells.amax(dim=0)
    in_unit_interval = bool((low >= 0).all() and (high <= 1).all())
    unit = 1.0 if in_unit_interval else (high - low).cpu().numpy()
    if not np.isfinite(unit).all():
        raise ValueError(
            f"The range of a feature of X is beyond what {str(cells.dtype).removeprefix('torch.')} "
            "holds; scale X, or use dtype='float64'."
        )
    if clip is None:
        return Domain(unit, None, None)
    if not isinstance(clip, str):
        try:
            bounds = np.asarray(clip, dtype=float)
        except (TypeError, ValueError):
            bounds = np.empty(0)
        if bounds.shape != (2,) or not bounds[0] < bounds[1]:
            raise ValueError(f"clip={clip!r} must be 'auto', None or a pair (low, high).")
        # Infinity leaves a side open; a number beyond the dtype would overflow inside of torch.
        if (np.isfinite(bounds) & (np.abs(bounds) > torch.finfo(cells.dtype).max)).any():
            raise ValueError(
                f"clip={clip!r} is beyond what {str(cells.dtype).removeprefix('torch.')} holds."
            )
        return Domain(unit, *bounds.tolist())
    if in_unit_interval:
        return Domain(unit, 0.0, 1.0)
    return Domain(unit, low.cpu().numpy(), high.cpu().numpy())


def class_quota(n_cells, n_classes):
    """Share cells among the classes; the first ones get what is left over.

    Parameters
    ----------
    n_cells, n_classes : int

    Returns
    -------
    list of int
    """
    share, left_over = divmod(n_cells, n_classes)
    return [share + (c < left_over) for c in range(n_classes)]


def clone_neighbors(index, n_cells):
    """Spread a population over the flocked neighbours, class after class.

    Parameters
    ----------
    index : torch.Tensor of shape (n, n_classes, n_neighbors), int64
        Neighbours of each row, -1 where a class has no more; the -1 come last.
    n_cells : int

    Returns
    -------
    parents : torch.Tensor of shape (n, n_cells), int64
        The example that each cell is a clone of. Classes without neighbours have no cells. A
        class's nearest neighbours get its remainder.
    labels : torch.Tensor of shape (n_cells,) or (n, n_cells), int64
        Of the latter shape where rows have neighbours in different classes.

    Raises
    ------
    ValueError
        If a row has no neighbours.
    """
    n_found = (index >= 0).sum(dim=2)
    if bool((n_found == n_found[0]).all()):
        return _clone_alike(index, n_found[0], n_cells)
    # Only an approximate index finds more for one row than for another.
    clones = [_clone_alike(index[[i]], n_found[i], n_cells) for i in range(len(index))]
    parents, labels = zip(*clones, strict=True)
    return torch.cat(parents), torch.stack(labels)


def _clone_alike(index, n_found, n_cells):
    """Clone the neighbours of rows of which each class has the same number."""
    present = n_found.nonzero()[:, 0]
    if len(present) == 0:
        raise ValueError(
            "No neighbours were found for a row: algorithm must find at least one in some class."
        )
    quota = torch.tensor(class_quota(n_cells, len(present)), device=index.device)
    rank = torch.arange(n_cells, device=index.device)
    position = torch.repeat_interleave(
        torch.arange(len(present), device=index.device), quota, output_size=n_cells
    )
    labels = present[position]
    rank = (rank - (torch.cumsum(quota, dim=0) - quota)[position]) % n_found[labels]
    return index[:, labels, rank].reshape(len(index), n_cells), labels


def mutation_steps(uniforms, rho, delta_min, delta_max, unit):
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


def mutate_(cells, steps, domain):
    """Move cells and clip them to their domain, in place.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_cells, n_features)
    steps : torch.Tensor of shape (n_cells, n_features)
    domain : Domain

    Returns
    -------
    torch.Tensor of shape (n, n_cells, n_features)
    """
    cells.add_(steps)
    return cells if domain.low is None else cells.clamp_(domain.low, domain.high)


def select_parents(affinity, labels, uniforms, tau, *, n_classes, selection):
    """Draw two parents of one class for every new cell.

    The first comes from P = softmax(affinity / tau) over the whole population ("global",
    Algorithm 1) or over a fixed number of draws in each class ("class_balanced"); the second from
    P restricted to the first one's class.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_cells)
    labels : torch.Tensor of shape (n, n_cells), int64
        Class of each cell, in ascending order.
    uniforms : dict of str to torch.Tensor of shape (n_cells,)
        ``"first"`` and ``"second"``.
    tau : float
    n_classes : int
    selection : {"global", "class_balanced"}

    Returns
    -------
    first, second : torch.Tensor of shape (n, n_cells), int64
        Positions of the parents; those of the first are in the order of their classes. Cells whose
        affinity is NaN or minus infinity are no parents while others of their row have one.

    Notes
    -----
    Uniform numbers have 24 bits: of more than 2**24 cells some cannot be drawn.
    """
    n_rows, n_cells = affinity.shape
    affinity, tau = replace_non_finite(affinity), _representable(tau, affinity)
    # Weights relative to the best of the class: no class's sum is lost to underflow. Cells without
    # an affinity weigh nothing, unless none of the sample has one.
    lowest = torch.finfo(affinity.dtype).min
    best = affinity.new_full((n_rows, n_classes), lowest)
    best.scatter_reduce_(1, labels, affinity, "amax")
    highest = best.amax(dim=1, keepdim=True)
    affinity = torch.where(highest == lowest, highest, affinity)
    weights = torch.exp((affinity - best.gather(1, labels)) / tau)
    # Sums in double precision: those of single precision stop growing at 2**24.
    sums = weights.cumsum(dim=1, dtype=torch.float64)
    cumulative = pad(sums, (1, 0))
    count = torch.zeros_like(labels[:, :1]).expand(n_rows, n_classes).clone()
    count.scatter_add_(1, labels, torch.ones_like(labels))
    stop = count.cumsum(dim=1)
    below, above = cumulative.gather(1, stop - count), cumulative.gather(1, stop)

    if selection == "global":
        mass = (above - below) * torch.exp((best - highest) / tau)
        edges = mass.cumsum(dim=1)
        target = uniforms["first"].sort().values * edges[:, -1:]
        target = torch.minimum(target, edges[:, -1:] * BELOW_ONE)
        child_labels = torch.searchsorted(edges, target, right=True)
        # Where in its class the draw lands, as a share of the class's mass.
        start_mass = (edges - mass).gather(1, child_labels)
        share = ((target - start_mass) / mass.gather(1, child_labels)).clamp_(min=0)
    else:
        child_labels = labels
        share = uniforms["first"].expand(n_rows, n_cells)

    lower, upper = below.gather(1, child_labels), above.gather(1, child_labels)
    width, last = upper - lower, upper * BELOW_ONE

    def draw(share):
        # Rounding must not carry a draw over the edge of its class, where weights are 0.
        return torch.searchsorted(sums, torch.minimum(lower + share * width, last), right=True)

    return draw(share), draw(uniforms["second"].expand(n_rows, n_cells))


def _representable(tau, like):
    """Give the nearest temperature above 0 that a tensor's dtype holds."""
    info = torch.finfo(like.dtype)
    return min(max(tau, info.tiny), info.max)


def cross_over(cells, affinity, first, second, uniforms, tau, *, crossover, out=None):
    """Take each element from the first parent with probability q, else from the second.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_cells, n_features)
    affinity : torch.Tensor of shape (n, n_cells)
    first, second : torch.Tensor of shape (n, n_cells), int64
    uniforms : torch.Tensor of shape (n_cells, n_features)
    tau : float
    crossover : {"affinity", "uniform"}
        q is the softmax of the two affinities over tau, or a half.
    out : torch.Tensor of shape (n, n_cells, n_features), default=None
        Where the result goes.

    Returns
    -------
    torch.Tensor of shape (n, n_cells, n_features)
    """
    n_rows, n_cells, n_features = cells.shape
    if crossover == "affinity":
        affinity, tau = replace_non_finite(affinity), _representable(tau, affinity)
        # Cells without an affinity are parents only of each other: inf - inf.
        better = (affinity.gather(1, first) - affinity.gather(1, second)).nan_to_num_(nan=0.0)
        q = torch.sigmoid(better / tau)
    else:
        q = affinity.new_full((n_rows, n_cells), 0.5)
    offset = torch.arange(n_rows, device=cells.device)[:, None] * n_cells
    flat = cells.reshape(n_rows * n_cells, n_features)

    def take(parents):
        return flat.index_select(0, (parents + offset).flatten()).view(cells.shape)

    # 1 where u < q and 0 elsewhere, several times as fast as a mask; and a weight of 0 or 1 gives
    # exactly the one or the other.
    from_first = torch.sub(q[..., None], uniforms).ceil_()
    return torch.lerp(take(second), take(first), from_first, out=out)


@dataclass(frozen=True)
class Schedule:
    """How a population matures: the parameters of Algorithm 1.

    Attributes
    ----------
    generations : int
    selection : {"global", "class_balanced"}
    crossover : {"affinity", "uniform"}
    n_plasma : int
    early_stopping : bool
    """

    generations: int
    selection: str
    crossover: str
    n_plasma: int
    early_stopping: bool


@dataclass(frozen=True)
class Population:
    """The final populations of some rows, and how they came about.

    Attributes
    ----------
    cells : torch.Tensor of shape (n, n_cells, n_features), or None if not kept
    labels : torch.Tensor of shape (n, n_cells), int64
    affinity : torch.Tensor of shape (n, n_cells)
    affinity_curve : torch.Tensor of shape (n, generations + 1)
        Mean affinity; NaN after a row has stopped.
    class_curve : torch.Tensor of shape (n, generations + 1, n_classes)
        Each class's share of the population; NaN after a row has stopped.
    n_generations : torch.Tensor of shape (n,), int64
    """

    cells: torch.Tensor | None
    labels: torch.Tensor
    affinity: torch.Tensor
    affinity_curve: torch.Tensor
    class_curve: torch.Tensor
    n_generations: torch.Tensor


def mature(
    cells,
    labels,
    *,
    measure,
    draw,
    tau,
    schedule,
    domain,
    n_classes,
    keep_cells,
    on_decided,
):
    """Breed populations toward their antigens (Algorithm 1 of Wang et al. 2021).

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_cells, n_features)
        The clones, not yet mutated; overwritten.
    labels : torch.Tensor of shape (n_cells,) or (n, n_cells), int64
        Their classes, in ascending order.
    measure : callable
        ``measure(cells, rows)``: affinities (m, n_cells) of the populations (m, n_cells,
        n_features) of the rows whose positions are ``rows`` (m,).
    draw : callable
        ``draw(generation)``: a dict of the uniform numbers ``"first"``, ``"second"`` and
        ``"cross"`` (see :func:`~sklearn_rails.immune.random.generation_uniforms`), and of the
        :func:`mutation_steps` ``"steps"``, on the cells' device.
    tau : float
    schedule : Schedule
    domain : Domain
    n_classes : int
    keep_cells : bool
        Whether the final cells are wanted.
    on_decided : callable
        Called with the number of rows that leave after a generation.

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
    affinity, leader = None, torch.full_like(rows, -1)
    children, cells = cells, None
    for generation in range(n_points):
        uniforms = draw(generation)
        if generation > 0:
            first, second = select_parents(
                affinity, labels, uniforms, tau, n_classes=n_classes, selection=schedule.selection
            )
            labels = labels.gather(1, first)
            cells, children = children, torch.empty_like(children) if cells is None else cells
        measured = []
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            bred = children[part]
            if generation > 0:
                cross_over(
                    cells[part],
                    affinity[part],
                    first[part],
                    second[part],
                    uniforms["cross"],
                    tau,
                    crossover=schedule.crossover,
                    out=bred,
                )
            measured.append(measure(mutate_(bred, uniforms["steps"], domain), rows[part]))
        affinity = replace_non_finite(torch.cat(measured))
        count = torch.zeros_like(labels[:, :1]).expand(-1, n_classes).clone()
        count.scatter_add_(1, labels, torch.ones_like(labels))
        class_curve[:, generation].index_copy_(0, rows, count.to(affinity) / n_cells)
        affinity_curve[:, generation].index_copy_(0, rows, mean_affinity(affinity))

        leaving, staying = torch.arange(len(rows), device=rows.device), None
        if generation < schedule.generations:
            if not schedule.early_stopping:
                continue
            previous, leader = leader, unanimous_class(affinity, labels, schedule.n_plasma)
            done = (leader >= 0) & (leader == previous)
            # The only place where the host waits for the device, once between two generations.
            done = done.cpu()
            if not done.any():
                continue
            leaving, staying = (d.nonzero()[:, 0].to(rows.device) for d in (done, ~done))
        on_decided(len(leaving))
        left = rows.index_select(0, leaving)
        n_generations.index_fill_(0, left, generation)
        final = affinity.index_select(0, leaving)
        source = find_stand_ins(final)
        final_affinity.index_copy_(0, left, final.gather(1, source))
        final_labels.index_copy_(0, left, labels.index_select(0, leaving).gather(1, source))
        if keep_cells:
            places = (leaving[:, None] * n_cells + source).flatten()
            part = children.flatten(0, 1).index_select(0, places)
            final_cells.index_copy_(0, left, part.view(len(leaving), n_cells, -1))
        if staying is None or len(staying) == 0:
            break
        rows, leader = rows.index_select(0, staying), leader.index_select(0, staying)
        affinity, labels = affinity.index_select(0, staying), labels.index_select(0, staying)
        children = children.index_select(0, staying)
        cells = None if cells is None else cells[: len(staying)]
    return Population(
        final_cells, final_labels, final_affinity, affinity_curve, class_curve, n_generations
    )


def check_alive(population, layer):
    """Raise an error if no cell of a population has an affinity.

    Parameters
    ----------
    population : Population
    layer : str

    Raises
    ------
    ValueError
        If all cells of a sample have features or an affinity that is NaN or infinite.
    """
    if not torch.isfinite(population.affinity).all():
        raise ValueError(
            f"layers={layer!r}: all cells of a population have features or an affinity that is NaN "
            "or infinite. The network or the affinity does not take mutated inputs: set clip to "
            "the range that it takes, or use a smaller delta_max."
        )


def mean_affinity(affinity):
    """Compute the mean affinity of the cells that have one.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_cells)
        Minus infinity for a cell without.

    Returns
    -------
    torch.Tensor of shape (n,)
        NaN where no cell has one.
    """
    missing = affinity == -torch.inf
    n_missing = missing.sum(dim=1)
    # Shares of the mean, since sums may overflow.
    count = affinity.shape[1] - n_missing
    shares = affinity.masked_fill(missing, 0).double() / count[:, None]
    largest = torch.finfo(affinity.dtype).max
    return shares.sum(dim=1).clamp(-largest, largest).to(affinity)


def find_stand_ins(affinity):
    """Find a cell for each place: itself, or the best one if it has no affinity.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_cells)
        Minus infinity for a cell without.

    Returns
    -------
    torch.Tensor of shape (n, n_cells), int64
    """
    best = affinity.argmax(dim=1, keepdim=True)
    own = torch.arange(affinity.shape[1], device=affinity.device)
    return torch.where(affinity == -torch.inf, best, own)
