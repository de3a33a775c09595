"""The order that examples are stored in, and the highest scores of each class."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from .geometry import DeviceTensors

# Number of scores of one class up to which the classes' scores are padded to one tensor. Copying
# them takes about 1.3 ns for each, and searching another class by itself 8 us more.
PADDED_SCORES = 6_000


class ClassGroup(NamedTuple):
    """Classes of similar sizes, padded to the largest.

    Attributes
    ----------
    classes : torch.Tensor of shape (n_group,), int64
    starts : torch.Tensor of shape (n_group, 1), int64
        Where each class begins in the store.
    places : torch.Tensor of shape (n_group * width,), int32
        Of the examples of each class, class after class, any place where one has no more.
    missing : torch.Tensor of shape (n_group, width), bool, or None
        Where a class has no more; None if all are equally large.
    width : int
        Number of examples in the largest class.
    """

    classes: Tensor
    starts: Tensor
    places: Tensor
    missing: Tensor | None
    width: int

    @classmethod
    def of(cls, classes: list[int], order: ClassOrder) -> ClassGroup:
        """Return a group of some classes.

        Parameters
        ----------
        classes : list of int
        order : ClassOrder

        Returns
        -------
        ClassGroup
        """
        device = order.starts.device
        counts = [order.sizes[c] for c in classes]
        width = max(counts)
        members = torch.tensor(classes, device=device)
        starts = order.starts[members, None]
        sizes = torch.tensor(counts, device=device)[:, None]
        column = torch.arange(width, device=device)
        # Half as many bytes are read for each query.
        places = (starts + torch.minimum(column, sizes - 1)).flatten().int()
        missing = column >= sizes if min(counts) < width else None
        return cls(members, starts, places, missing, width)


class ClassOrder(DeviceTensors):
    """The order that examples are stored in: class after class.

    Parameters
    ----------
    y : ndarray of shape (n_samples,)
        Classes as integers from 0.
    n_classes : int

    Attributes
    ----------
    index : torch.Tensor of shape (n_samples,), int64
        Position of each stored example among those of ``y``.
    sizes : list of int
        Examples of each class.
    starts : torch.Tensor of shape (n_classes,), int64
        Where each class begins.
    smallest : int
        Number of examples in the smallest class.
    is_sorted : bool
        Whether ``index`` ascends within each class.
    """

    DEVICE_TENSORS: ClassVar[tuple[str, ...]] = ("index", "starts")

    def __init__(self, y: NDArray[np.integer], n_classes: int) -> None:
        # A stable sort: within a class the examples keep their order, and so ties do.
        self.index = torch.from_numpy(np.argsort(y, kind="stable"))
        self.sizes: list[int] = np.bincount(y, minlength=n_classes).tolist()
        self.starts = torch.tensor([0, *np.cumsum(self.sizes[:-1])])
        self.smallest = min(self.sizes)
        self.is_sorted = True
        self._groups: list[ClassGroup] | None = None
        self._inverse: Tensor | None = None

    def groups(self) -> list[ClassGroup]:
        """Return the classes in groups of similar sizes, largest first; computed once.

        Returns
        -------
        list of ClassGroup
            Of all classes that have examples. The smallest class of a group has at least half as
            many as the largest, so that padding at most doubles a group.
        """
        if self._groups is None:
            present = [c for c, size in enumerate(self.sizes) if size]
            members: list[list[int]] = []
            for c in sorted(present, key=self.sizes.__getitem__, reverse=True):
                if not members or 2 * self.sizes[c] < self.sizes[members[-1][0]]:
                    members.append([])
                members[-1].append(c)
            self._groups = [ClassGroup.of(sorted(classes), self) for classes in members]
        return self._groups

    def move_to(self, device: torch.device) -> None:
        """Move to a device.

        Parameters
        ----------
        device : torch.device
        """
        super().move_to(device)
        self._groups = self._inverse = None

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() | {"_groups": None, "_inverse": None}
        # The smallest type that holds the positions: for few features they take much of a file.
        state["index"] = state["index"].astype(np.min_scalar_type(len(self.index)))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.index = torch.from_numpy(state["index"].astype(np.int64))

    def inverse(self) -> Tensor:
        """Return the place in the store of each of the examples; computed once.

        Returns
        -------
        torch.Tensor of shape (n_samples,), int64
        """
        if self._inverse is None:
            inverse_order = torch.empty_like(self.index)
            inverse_order[self.index] = torch.arange(len(self.index), device=self.index.device)
            self._inverse = inverse_order
        return self._inverse

    def pooled(self) -> ClassOrder:
        """Return the same order as that of a single class.

        Returns
        -------
        ClassOrder
        """
        view = copy.copy(self)
        view.sizes, view.starts, view.is_sorted = [len(self.index)], self.starts[:1], False
        view.smallest, view._groups = len(self.index), None
        return view

    def sort_places(self, places: Tensor) -> Tensor:
        """Sort places by the positions of their examples, those that do not exist (-1) first.

        Parameters
        ----------
        places : torch.Tensor of shape (n, n_classes, n_candidates), int64

        Returns
        -------
        torch.Tensor of shape (n, n_classes, n_candidates), int64
        """
        if self.is_sorted:
            return places.sort(dim=2).values
        positions = self.index[places.clamp(min=0)].masked_fill_(places < 0, -1)
        return places.gather(2, positions.argsort(dim=2))


def find_top_scores(scores: Tensor, order: ClassOrder, n_best: int) -> tuple[Tensor, Tensor]:
    """Find the highest scores of each class.

    Parameters
    ----------
    scores : torch.Tensor of shape (n, n_samples)
        Of all stored examples; minus infinity for those that are ruled out.
    order : ClassOrder
    n_best : int

    Returns
    -------
    top : torch.Tensor of shape (n, n_classes, n_best)
        Highest first; minus infinity where a class has no more examples.
    places : torch.Tensor of shape (n, n_classes, n_best), int64
        Of their examples; -1 where there is none, or it is ruled out.
    """
    n, n_classes = len(scores), len(order.sizes)
    if n_classes > 1 and n * max(order.sizes) <= PADDED_SCORES:
        groups = order.groups()
        parts = [_top_of_group(scores, group, n_best) for group in groups]
        if len(parts[0][0][0]) == n_classes:
            return parts[0]
        top = scores.new_full((n, n_classes, n_best), -torch.inf)
        places = torch.full(top.shape, -1, device=scores.device)
        for group, (values, found) in zip(groups, parts, strict=True):
            top[:, group.classes], places[:, group.classes] = values, found
        return top, places
    best = []
    for members in torch.split(scores, order.sizes, dim=1):
        best.append(_pad(*members.topk(min(n_best, members.shape[1]), dim=1), n_best))
    top, places = (torch.stack(part, dim=1) for part in zip(*best, strict=True))
    return top, places.add_(order.starts[:, None]).masked_fill_(top == -torch.inf, -1)


def _top_of_group(scores: Tensor, group: ClassGroup, n_best: int) -> tuple[Tensor, Tensor]:
    padded = scores.index_select(1, group.places).view(len(scores), -1, group.width)
    if group.missing is not None:
        padded.masked_fill_(group.missing, -torch.inf)
    top, found = _pad(*padded.topk(min(n_best, group.width), dim=2), n_best)
    return top, (found + group.starts).masked_fill_(top == -torch.inf, -1)


def _pad(top: Tensor, found: Tensor, n_best: int) -> tuple[Tensor, Tensor]:
    missing = n_best - top.shape[-1]
    if not missing:
        return top, found
    return pad(top, (0, missing), value=-torch.inf), pad(found, (0, missing))
