"""What RAILS learns after it was fitted: memory cells, and more training rows."""

from numbers import Real
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_consistent_length, check_is_fitted

from ._base import restore_on_error, validate_rows
from ._compat import fit_context
from ._validation import check_known_labels, validate_labels
from .immune.memory import MemoryBank
from .immune.response import ImmuneResponse
from .neighbors.index import ClassNeighbors


class Remembers:
    """The part of RAILS that learns from responses and from more data."""

    @restore_on_error
    @fit_context(prefer_skip_nested_validation=False)
    def partial_fit(
        self,
        X: ArrayLike | torch.Tensor,
        y: ArrayLike | torch.Tensor,
        classes: ArrayLike | None = None,
    ) -> Self:
        """Add labelled training data, and keep what is remembered.

        Parameters
        ----------
        X : array-like of shape (n, n_features) or (n, *input_shape), or torch.Tensor
            Training inputs, finite.
        y : array-like of shape (n,)
            Their classes.
        classes : array-like of shape (n_classes,), default=None
            All classes that will ever come, those without a sample included; others are then an
            error. A class without samples has no neighbours and gets no votes.

        Returns
        -------
        RAILSClassifier
            The estimator itself, as if :meth:`fit` had got all rows so far: indexing them anew
            costs a forward pass for each.

        Raises
        ------
        TypeError, ValueError
            As :meth:`fit`; or if the rows do not fit those before, or have a class that is not in
            ``classes``. The estimator is then as it was before.
        """
        if not hasattr(self, "classes_"):
            self._named_classes = classes
            return self.fit(X, y)
        y = validate_labels(y)
        known = self.classes_
        if classes is not None:
            check_known_labels(y, classes, "classes")
        elif self._classes_are_named:
            check_known_labels(y, known, "the classes of the first call")
        if _holds_strings(known) != _holds_strings(y):
            raise ValueError(f"y has labels of {y.dtype}, but those of fit are of {known.dtype}.")
        # All samples are indexed anew, by the network as it is now.
        self._features = self._features.rebased()
        rows = validate_rows(self, X)
        check_consistent_length(rows, y)
        named = () if classes is None else classes
        self.classes_ = np.unique(np.concatenate([known, y, *([named] if len(named) else [])]))
        to_device = self._features.to_device
        before = self._cells if self._features.start_layer is None else self._rows
        rows = torch.cat([to_device(before), to_device(rows)])
        rows = rows.numpy() if rows.device.type == "cpu" else rows
        y = np.concatenate([known[self._y], y])
        memory = self.memory_
        self._learn(rows, y, (rows.reshape(len(rows), *self._given_shape), y))
        places = np.searchsorted(self.classes_, known)
        self.memory_ = {
            layer: bank.with_classes(len(self.classes_), places) for layer, bank in memory.items()
        }
        self._index_memory()
        return self

    @restore_on_error
    def remember(
        self,
        response: ImmuneResponse,
        y: ArrayLike | torch.Tensor | None = None,
        *,
        confidence: float = 0.9,
    ) -> Self:
        """Keep a response's memory cells: from now on they are flocked as training rows are.

        Of each row those cells are kept that are of the class that it was answered with, if the
        plasma agreed on it; or, if its class is given, those that are of this class. Wrong
        memories poison: whoever can feed rows can plant confident wrong answers, unless ``y`` is
        given.

        Parameters
        ----------
        response : ImmuneResponse
            What :meth:`respond` gave.
        y : array-like of shape (n,), default=None
            The true classes of its rows.
        confidence : float, default=0.9
            Share of the plasma, over all layers, that must be of the class that a row was answered
            with, without ``y``. 0 keeps all rows.

        Returns
        -------
        RAILSClassifier
            The estimator itself. Each class has an equal share of ``memory_capacity``; the cells
            that were remembered longest ago go first, and a cell is kept only once.

        Raises
        ------
        TypeError, ValueError
            If the response is none, or one of an estimator with other layers, classes or cells, or
            ``y`` does not fit. Nothing is then remembered.
        """
        check_is_fitted(self)
        wanted, kept = self._check_memories(response, y, confidence)
        memory = {}
        for layer, bank in self.memory_.items():
            # The best cells count as the newest of a row.
            cells = response.memory[layer][:, ::-1]
            labels = np.searchsorted(self.classes_, response.memory_labels[layer][:, ::-1])
            chosen = (labels == wanted[:, None]) & kept[:, None]
            memory[layer] = bank.with_cells(cells[chosen], labels[chosen])
        self.memory_ = memory
        self._index_memory()
        return self

    @restore_on_error
    def forget(self) -> Self:
        """Forget all that is remembered.

        Returns
        -------
        RAILSClassifier
            The estimator itself.
        """
        check_is_fitted(self)
        return self._forget()

    def _forget(self):
        shape = self._features.cell_shape
        self.memory_ = {
            layer: MemoryBank(self.memory_capacity, len(self.classes_), shape)
            for layer in self.layers_
        }
        self._index_memory()
        return self

    def _find_cells(self, index, layer):
        """Give training rows, or beyond these remembered cells, by their positions."""
        bank, n_train = self._cells, len(self._y)
        if layer not in self._remembered:
            return bank[index]
        cells = bank[index.clamp(max=n_train - 1)]
        remembered = self._features.to_device(self.memory_[layer].cells).flatten(1)
        beyond = index >= n_train
        cells[beyond] = remembered[index[beyond] - n_train]
        return cells

    def _index_memory(self):
        """Make what is remembered ready to be flocked."""
        self._remembered = {}
        for layer, bank in self.memory_.items():
            if len(bank):
                cells = self._features.to_device(bank.cells).flatten(1)
                features = self._features.features_of_cells(cells, layer)
                neighbors = ClassNeighbors(self.affinity)
                self._remembered[layer] = neighbors.fit(features, bank.labels, len(self.classes_))

    def _check_memories(self, response, y, confidence):
        """Give the class that each row's memories must be of, and the rows that are kept."""
        if not isinstance(response, ImmuneResponse):
            raise TypeError(f"response must be what respond gave, got {type(response).__name__}.")
        if not isinstance(confidence, Real) or not 0 <= confidence <= 1:
            raise ValueError(f"confidence={confidence!r} must be between 0 and 1.")
        shape = self._features.cell_shape
        fits = set(response.memory) == set(self.layers_) and all(
            response.memory[layer].shape[2:] == shape
            and np.isin(response.memory_labels[layer], self.classes_).all()
            for layer in self.layers_
        )
        if not fits:
            raise ValueError(
                "response is that of another estimator: its memory cells must be of the layers "
                f"{list(self.layers_)}, of shape {shape} and of the classes that were fitted."
            )
        if y is None:
            plasma = np.concatenate(list(response.plasma_labels.values()), axis=1)
            agreed = (plasma == response.labels[:, None]).mean(axis=1)
            return np.searchsorted(self.classes_, response.labels), agreed >= confidence
        y = validate_labels(y)
        check_consistent_length(response.labels, y)
        check_known_labels(y, self.classes_, "the classes of fit")
        return np.searchsorted(self.classes_, y), np.ones(len(y), dtype=bool)


def _holds_strings(labels):
    return all(isinstance(label, str) for label in labels.tolist())
