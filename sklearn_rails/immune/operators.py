"""The operators that turn a population into the next one.

Every function is pure: random numbers come in as arguments, uniform in [0, 1) and shared by all
samples, so that predictions are deterministic. Populations are kept sorted by class: a class is a
slice, and one cumulative sum serves the choice of both parents.

Affinities of a population are finite, or minus infinity for a cell without one (see
:func:`replace_non_finite`): it is not selected, no parent, and has no vote while other cells of its
population have an affinity.
"""

import torch
from torch.nn.functional import pad

from .domain import Domain

# Times this, a number in double precision is the next smaller one, or the one after that.
BELOW_ONE = 1 - 2**-53


def class_quota(n_cells: int, n_classes: int) -> list[int]:
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


def clone_neighbors(
    index: torch.Tensor, affinity: torch.Tensor, n_cells: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Spread a population over the flocked neighbours, class after class.

    Parameters
    ----------
    index : torch.Tensor of shape (n, n_classes, n_neighbors), int64
        Neighbours of each sample, -1 where a class has no more; the -1 come last.
    affinity : torch.Tensor of shape (n, n_classes, n_neighbors)
        Their affinities.
    n_cells : int

    Returns
    -------
    parents : torch.Tensor of shape (n, n_cells), int64
        The example that each cell is a clone of. Classes without neighbours have no cells. A
        class's nearest neighbours get its remainder.
    labels : torch.Tensor of shape (n, n_cells), int64
        Their classes, in ascending order.
    affinity : torch.Tensor of shape (n, n_cells)
        Their affinities.

    Raises
    ------
    ValueError
        If a sample has no neighbours.
    """
    n_found = (index >= 0).sum(dim=2)
    if bool((n_found == n_found[0]).all()):
        labels, ranks = _share_cells(n_found[0], n_cells)
        return index[:, labels, ranks], labels.expand(len(index), -1), affinity[:, labels, ranks]
    # Only an approximate index finds more for one sample than for another.
    labels, ranks = (
        torch.stack(parts)
        for parts in zip(*(_share_cells(found, n_cells) for found in n_found), strict=True)
    )
    places = labels * index.shape[2] + ranks
    return index.flatten(1).gather(1, places), labels, affinity.flatten(1).gather(1, places)


def _share_cells(n_found: torch.Tensor, n_cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Share cells among the neighbours that were found in each class: labels, and ranks there."""
    present = n_found.nonzero()[:, 0]
    if len(present) == 0:
        raise ValueError(
            "No neighbours were found for a sample: algorithm must find at least one in some class."
        )
    quota = torch.tensor(class_quota(n_cells, len(present)), device=n_found.device)
    rank = torch.arange(n_cells, device=n_found.device)
    position = torch.repeat_interleave(
        torch.arange(len(present), device=n_found.device), quota, output_size=n_cells
    )
    labels = present[position]
    return labels, (rank - (torch.cumsum(quota, dim=0) - quota)[position]) % n_found[labels]


def mutate_(cells: torch.Tensor, steps: torch.Tensor, domain: Domain) -> torch.Tensor:
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


def select_parents(
    affinity: torch.Tensor,
    labels: torch.Tensor,
    uniforms: dict[str, torch.Tensor],
    tau: float,
    *,
    n_classes: int,
    selection: str,
) -> tuple[torch.Tensor, torch.Tensor]:
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
        Positions of the parents; those of the first are in the order of their classes. Cells
        without an affinity are no parents while others of their sample have one.

    Notes
    -----
    Uniform numbers have 24 bits: of more than 2**24 cells some cannot be drawn.
    """
    n_rows, n_cells = affinity.shape
    tau = _representable(tau, affinity)
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
    count = class_counts(labels, n_classes)
    stop = count.cumsum(dim=1)
    below, above = cumulative.gather(1, stop - count), cumulative.gather(1, stop)

    if selection == "global":
        mass = (above - below) * torch.exp((best - highest) / tau)
        edges = mass.cumsum(dim=1)
        target = uniforms["first"].sort().values * edges[:, -1:]
        child_labels = torch.searchsorted(edges, target, right=True)
        # Where in its class the draw lands, as a share of the class's mass.
        start_mass = (edges - mass).gather(1, child_labels)
        share = ((target - start_mass) / mass.gather(1, child_labels)).clamp_(min=0)
    else:
        child_labels = labels
        share = uniforms["first"].expand(n_rows, n_cells)

    lower, upper = below.gather(1, child_labels), above.gather(1, child_labels)
    width, last = upper - lower, upper * BELOW_ONE

    def draw(share: torch.Tensor) -> torch.Tensor:
        # Rounding must not carry a draw over the edge of its class, where weights are 0.
        return torch.searchsorted(sums, torch.minimum(lower + share * width, last), right=True)

    return draw(share), draw(uniforms["second"].expand(n_rows, n_cells))


def _representable(tau: float, like: torch.Tensor) -> float:
    """Return the nearest temperature above 0 that a tensor's dtype holds."""
    info = torch.finfo(like.dtype)
    return min(max(tau, info.tiny), info.max)


def first_parent_share(
    affinity: torch.Tensor, first: torch.Tensor, second: torch.Tensor, tau: float, crossover: str
) -> torch.Tensor:
    """Return the probability q that an element comes from the first parent.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_cells)
    first, second : torch.Tensor of shape (n, n_cells), int64
        Positions of the parents.
    tau : float
    crossover : {"affinity", "uniform"}
        The softmax of the two parents' affinities over tau, or a half.

    Returns
    -------
    torch.Tensor of shape (n, n_cells)
    """
    if crossover == "uniform":
        return torch.full_like(affinity, 0.5)
    tau = _representable(tau, affinity)
    # Cells without an affinity are parents only of each other: inf - inf.
    better = (affinity.gather(1, first) - affinity.gather(1, second)).nan_to_num_(nan=0.0)
    return torch.sigmoid(better / tau)


def cross_over(
    cells: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    q: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Take each element from the first parent with probability q, else from the second.

    Parameters
    ----------
    cells : torch.Tensor of shape (n, n_cells, n_features)
    first, second : torch.Tensor of shape (n, n_cells), int64
        Positions of the parents.
    q : torch.Tensor of shape (n, n_cells)
        As :func:`first_parent_share` returns it.
    uniforms : torch.Tensor of shape (n_cells, n_features)
    out : torch.Tensor of shape (n, n_cells, n_features), default=None
        Where the result goes.

    Returns
    -------
    torch.Tensor of shape (n, n_cells, n_features)
    """
    n_rows, n_cells, n_features = cells.shape
    offset = torch.arange(n_rows, device=cells.device)[:, None] * n_cells
    flat = cells.reshape(n_rows * n_cells, n_features)

    def take(parents: torch.Tensor) -> torch.Tensor:
        return flat.index_select(0, (parents + offset).flatten()).view(cells.shape)

    # 1 where u < q and 0 elsewhere, several times as fast as a mask; and a weight of 0 or 1 gives
    # exactly the one or the other.
    from_first = torch.sub(q[..., None], uniforms).ceil_()
    return torch.lerp(take(second), take(first), from_first, out=out)


def replace_non_finite(affinity: torch.Tensor) -> torch.Tensor:
    """Apply the rule for non-finite affinities: minus infinity for NaN, no plus infinity.

    Parameters
    ----------
    affinity : torch.Tensor

    Returns
    -------
    torch.Tensor
    """
    return affinity.nan_to_num(
        nan=-torch.inf, posinf=torch.finfo(affinity.dtype).max, neginf=-torch.inf
    )


def mean_affinity(affinity: torch.Tensor) -> torch.Tensor:
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


def class_counts(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Count the cells of each class.

    Parameters
    ----------
    labels : torch.Tensor of shape (n, n_cells), int64
    n_classes : int

    Returns
    -------
    torch.Tensor of shape (n, n_classes), int64
    """
    count = torch.zeros_like(labels[:, :1]).expand(-1, n_classes).clone()
    return count.scatter_add_(1, labels, torch.ones_like(labels))


def find_stand_ins(affinity: torch.Tensor) -> torch.Tensor:
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


def leading_class(
    affinity: torch.Tensor, labels: torch.Tensor, n_plasma: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the class that all of a population's plasma is of, and how far it leads.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_cells)
        Cells without an affinity, minus infinity, have no say.
    labels : torch.Tensor of shape (n, n_cells), int64
    n_plasma : int

    Returns
    -------
    leader : torch.Tensor of shape (n,), int64
        The class, or -1 where the plasma is divided or no cell has an affinity.
    lead : torch.Tensor of shape (n,)
        Highest affinity of the population minus that of the leader's rivals, infinite where there
        are none; meaningless without a leader.
    """
    ranking = affinity.sort(dim=1, descending=True, stable=True)
    plasma, silent = labels.gather(1, ranking.indices[:, :n_plasma]), ranking.values == -torch.inf
    agree = ((plasma == plasma[:, :1]) | silent[:, :n_plasma]).all(dim=1)
    leader = torch.where(agree, plasma[:, 0], -1).masked_fill_(silent[:, 0], -1)
    rivals = affinity.masked_fill(labels == leader[:, None], -torch.inf)
    return leader, ranking.values[:, 0] - rivals.amax(dim=1)


def check_alive(affinity: torch.Tensor, layer: str) -> None:
    """Raise an error if no cell of a population has an affinity.

    Parameters
    ----------
    affinity : torch.Tensor of shape (n, n_cells)
    layer : str

    Raises
    ------
    ValueError
        If all cells of a sample have features or an affinity that is NaN or infinite.
    """
    if not torch.isfinite(affinity).all():
        raise ValueError(
            f"layers={layer!r}: all cells of a population have features or an affinity that is NaN "
            "or infinite. The network or the affinity does not take mutated inputs: set clip to "
            "the range that it takes, or use a smaller delta_max."
        )
