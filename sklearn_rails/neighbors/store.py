"""Where the examples of a nearest-neighbour search are kept: in memory, there halved, on disk."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from torch import Tensor

from .._compat import StrOptions
from .._conformal import sample_rows
from .allocation import allocate_store
from .base import Affinity
from .geometry import DeviceTensors

# Number of examples that the typical place and scale of all are estimated from. Their median is
# off by about 1.25 / sqrt(256) = 8 % of the spread. That changes speed, but no neighbour.
TYPICAL_ROWS = 256

# Half precision has all its 11 bits between 6e-5 and 65504. An example's largest difference from
# the centre is scaled to 16 in the median: 12 binary digits below the overflow, 18 above the loss.
FLOAT16_TYPICAL, FLOAT16_MAX = 16, 65504

# Size in bytes of a block: of examples that are read at a time, of scores or of distances. It
# bounds the memory of a search, whatever the number of queries.
BLOCK_BYTES = 64 * 2**20


class ExactNeighbors(BaseEstimator):
    """Find nearest neighbours exactly, by a matrix product.

    The value of the parameter ``algorithm`` of :class:`~sklearn_rails.RAILSClassifier` that
    ``"auto"`` means, with a choice of where the training samples' features are kept. The
    neighbours are the same wherever that is.

    Parameters
    ----------
    storage : {"memory", "float16"} or path, default="memory"
        Where the features are kept.

        - ``"memory"``: in full precision on the device of the network.
        - ``"float16"``: in half of that memory. Neighbours are found in half precision, and those
          among which it cannot decide are computed anew from the training data and compared in
          full precision. Choose it where features take most of the memory. Needs one of the
          built-in affinities.
        - A folder: in a temporary file there, which is mapped into memory, leaves no name behind
          and is deleted with the index. Choose it for features that memory does not hold.

    See Also
    --------
    sklearn.neighbors.NearestNeighbors : Trees, which pay for fewer than about 10 features.

    Examples
    --------
    Features in half precision take half the memory, and the neighbours stay exact:

    >>> import numpy as np, torch
    >>> from sklearn_rails.neighbors import ClassNeighbors, ExactNeighbors
    >>> features = torch.arange(1000.0).reshape(-1, 2).sqrt()
    >>> labels = np.arange(500) % 2
    >>> neighbors = ClassNeighbors(algorithm=ExactNeighbors(storage="float16"))
    >>> neighbors = neighbors.fit(features, labels, n_classes=2)
    >>> affinity, index = neighbors.kneighbors(
    ...     features[:1] + 9, n_neighbors=3, recompute=features.__getitem__
    ... )
    >>> index.tolist()
    [[[44, 46, 42], [45, 43, 47]]]
    >>> neighbors.store.examples.nbytes / features.nbytes
    0.5
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "storage": [StrOptions({"memory", "float16"}), str, os.PathLike],
    }

    def __init__(self, storage: str | os.PathLike[str] = "memory") -> None:
        self.storage = storage

    def make_store(self, affinity: Affinity) -> ExampleStore:
        """Return an empty store for examples.

        Parameters
        ----------
        affinity : Affinity
            That the examples will be compared by.

        Returns
        -------
        ExampleStore
            Without room for any.

        Raises
        ------
        ValueError
            If the storage is unknown, or does not go with the affinity.
        """
        self._validate_params()
        if self.storage == "memory":
            return ExampleStore()
        if self.storage == "float16":
            if not affinity.has_quick_score:
                raise ValueError(
                    "storage='float16' cannot bound what rounding does to an affinity of your "
                    "own; use storage='memory' or a folder."
                )
            return HalfPrecisionStore(center=affinity.is_distance)
        if not (str(self.storage) and Path(self.storage).is_dir()):
            raise ValueError(
                f"storage={str(self.storage)!r} must be 'memory', 'float16' or a folder that "
                "exists."
            )
        return ExampleStore(self.storage)


class ExampleStore(DeviceTensors):
    """Examples in full precision.

    Parameters
    ----------
    folder : path, default=None
        Where a temporary file holds them; None keeps them in memory.

    Attributes
    ----------
    examples : torch.Tensor of shape (n_samples, n_features)
        (x - shift) * scale of the features x.
    shift : torch.Tensor of shape (n_features,)
        Of the features' own dtype.
    has_shift : bool
        Whether ``shift`` is not all zeros.
    scale : float
    max_rounding_error : float
        Largest distance between stored and true examples, times ``scale``.
    """

    DEVICE_TENSORS: ClassVar[tuple[str, ...]] = ("shift",)
    needs_recompute: ClassVar[bool] = False

    examples: Tensor
    shift: Tensor

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = folder
        self.has_shift = False
        self.scale = 1.0
        self.max_rounding_error = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether no room has been allocated."""
        return not hasattr(self, "examples")

    def allocate(self, n_samples: int, features: Tensor) -> None:
        """Allocate memory, or a file.

        Parameters
        ----------
        n_samples : int
        features : torch.Tensor of shape (n, n_features)
            Some of the examples: device, dtype and typical values.

        Raises
        ------
        OSError
            If the folder's disk has not enough space.
        """
        self.shift = torch.zeros_like(features[0])
        self._choose_scale(features)
        shape = (n_samples, features.shape[1])
        # Last, since without examples a store whose allocation failed is still empty.
        self.examples = allocate_store(self.folder, shape, self._like(features))

    def _choose_scale(self, features: Tensor) -> None:
        """Choose shift and scale by the examples at hand; by default there are none."""

    def _like(self, features: Tensor) -> Tensor:
        return features

    def add(self, places: Tensor, features: Tensor) -> None:
        """Store examples.

        Parameters
        ----------
        places : torch.Tensor of shape (n,), int64
            Where they stand among all.
        features : torch.Tensor of shape (n, n_features)
        """
        device = self.examples.device
        self.examples.index_copy_(0, places.to(device), features.to(device))

    def take(self, places: Tensor, like: Tensor) -> Tensor:
        """Return a copy of some examples in full precision.

        Parameters
        ----------
        places : torch.Tensor of shape (n,), int64
        like : torch.Tensor
            With the device and dtype that are needed.

        Returns
        -------
        torch.Tensor of shape (n, n_features)
        """
        examples = self.examples.index_select(0, places.to(self.examples.device)).to(like)
        return examples.add_(self.shift) if self.has_shift else examples

    def read(self, members: slice) -> Tensor:
        """Return examples that stand side by side, not copied if they need not be shifted.

        Parameters
        ----------
        members : slice

        Returns
        -------
        torch.Tensor of shape (n, n_features)
        """
        examples = self.examples[members]
        return examples + self.shift if self.has_shift else examples

    def pieces(self, like: Tensor, n_bytes: int) -> Iterator[Tensor]:
        """Iterate over the stored examples, converted piece by piece.

        Parameters
        ----------
        like : torch.Tensor
            With the device and dtype that are needed.
        n_bytes : int
            Size of a piece after conversion.

        Yields
        ------
        torch.Tensor of shape (n, n_features)
            Overwritten by the next one.
        """
        step = max(1, n_bytes // (self.examples.shape[1] * like.element_size()))
        pieces = torch.split(self.examples, step)
        if self.examples.dtype == like.dtype and self.examples.device == like.device:
            yield from pieces
            return
        # New memory for every piece would take up to twice the time of the conversion.
        buffer = like.new_empty(pieces[0].shape)
        for piece in pieces:
            yield buffer[: len(piece)].copy_(piece)

    def sample(self) -> Tensor:
        """Return some of the stored examples, drawn at random, in full precision.

        Returns
        -------
        torch.Tensor of shape (n, n_features)
        """
        return self.examples[self.sample_places()].to(self.shift)

    def sample_places(self) -> NDArray[np.int64]:
        """Return the places of the examples that :meth:`sample` returns.

        Returns
        -------
        ndarray of shape (n,), int64
        """
        return sample_rows(len(self.examples), TYPICAL_ROWS, rng=0)

    def shift_features(self, columns: Tensor, constants: Tensor) -> None:
        """Store features as differences from constants, where no example loses a bit by that.

        Parameters
        ----------
        columns : torch.Tensor of shape (n,), int64
            Which features.
        constants : torch.Tensor of shape (n,)
        """
        if not len(columns):
            return
        pieces = torch.split(self.examples, max(1, BLOCK_BYTES // self.examples[0].nbytes))
        kept = torch.ones_like(columns, dtype=torch.bool)
        for piece in pieces:
            values = piece[:, columns.to(piece.device)].to(constants)
            kept &= ((values - constants) + constants == values).all(dim=0)
        self.shift[columns[kept]] = constants[kept]
        self.has_shift = bool(self.shift.any())
        if self.has_shift:
            for piece in pieces:
                piece -= self.shift.to(piece.device)

    def on_disk(self) -> ExampleStore:
        """Return the same store in a temporary file.

        Returns
        -------
        ExampleStore

        Raises
        ------
        OSError
            If the disk has not enough space.
        """
        if self.folder is not None:
            return self
        view = copy.copy(self)
        view.folder = tempfile.gettempdir()
        view.examples = allocate_store(view.folder, tuple(self.examples.shape), self.examples)
        view.examples.copy_(self.examples)
        return view

    def move_to(self, device: torch.device) -> None:
        """Move to a device, but for a file: its pieces go there one by one.

        Parameters
        ----------
        device : torch.device
        """
        super().move_to(device)
        if self.folder is None:
            self.examples = self.examples.to(device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with warnings.catch_warnings():
            # Examples that are mapped from disk stay there; torch warns that they are read-only.
            warnings.simplefilter("ignore", UserWarning)
            self.examples = torch.from_numpy(np.asarray(state["examples"]))


class HalfPrecisionStore(ExampleStore):
    """Examples in half precision, shifted and scaled to its range.

    Parameters
    ----------
    center : bool
        Whether a shift of all examples changes nothing.
    """

    needs_recompute: ClassVar[bool] = True

    def __init__(self, *, center: bool) -> None:
        super().__init__()
        self._center = center

    def _like(self, features: Tensor) -> Tensor:
        return features.new_empty(0, dtype=torch.float16)

    def _choose_scale(self, features: Tensor) -> None:
        sample = features[sample_rows(len(features), TYPICAL_ROWS, rng=0)]
        if self._center:
            self.shift = sample.median(dim=0).values
            self.has_shift = bool(self.shift.any())
        peak = float((sample - self.shift).abs().amax(dim=1).median())
        # Differences this far below the features are rounding, and must not overflow when squared.
        largest = max(float(sample.abs().max()) * 2.0**-50, 2.0**-100)
        self.scale = min(FLOAT16_TYPICAL / peak, 1 / largest) if peak > 0 else 1.0

    def add(self, places: Tensor, features: Tensor) -> None:
        """Store examples, and measure what rounding does to them.

        Parameters
        ----------
        places : torch.Tensor of shape (n,), int64
        features : torch.Tensor of shape (n, n_features)
        """
        scaled = (features - self.shift) * self.scale
        rounded = scaled.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        error = torch.linalg.vector_norm(scaled - rounded, dim=1).max()
        largest = torch.finfo(error.dtype).max
        self.max_rounding_error = max(self.max_rounding_error, min(float(error), largest))
        super().add(places, rounded)
