"""Tensors on a GPU are checked where they are; here the same checks see tensors on the CPU."""

import numpy as np
import pytest
import torch

from sklearn_rails import RAILSClassifier, _base, _validation


@pytest.fixture
def as_if_on_gpu(monkeypatch):
    def keep(X):
        shape = tuple(X.shape[1:]) if X.ndim > 2 else ()
        return X.reshape(len(X), -1) if shape else X, shape

    monkeypatch.setattr(_validation, "flatten", keep)
    monkeypatch.setattr(_base, "flatten", keep)


def test_tensors_are_checked_as_arrays_are(as_if_on_gpu):
    rails = RAILSClassifier(input_shape=(1, 2, 2))
    X, y = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 0, 1])
    flat, labels = _validation.validate_fit_rows(rails, X, y, input_shape=(1, 2, 2))
    assert torch.is_tensor(flat)
    assert flat.shape == (6, 4)
    assert isinstance(labels, np.ndarray)
    assert rails.n_features_in_ == 4
    assert rails.input_shape_ == (1, 2, 2)
    assert _base.validate_rows(rails, X[:2]).shape == (2, 4)


@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (torch.tensor([[1.0, torch.nan]]), [0], "NaN or infinity"),
        (torch.tensor([[1.0, torch.inf]]), [0], "NaN or infinity"),
        (torch.ones(3), [0, 0, 0], r"got shape \(3,\)"),
        (torch.ones(0, 2), [], "0 sample"),
        (torch.ones(2, 2), [0], "inconsistent numbers of samples"),
        (torch.ones(2, 2), [0.5, 1.2], "Unknown label type"),
        (torch.ones(2, 2), None, "y"),
    ],
)
def test_invalid_tensors_raise(as_if_on_gpu, X, y, message):
    with pytest.raises(ValueError, match=message):
        _validation.validate_fit_rows(RAILSClassifier(), X, y, input_shape=None)


def test_tensors_of_another_width_are_refused(as_if_on_gpu):
    rails = RAILSClassifier()
    _validation.validate_fit_rows(rails, torch.rand(4, 3), [0, 1, 0, 1], input_shape=None)
    with pytest.raises(ValueError, match="X has 5 features, but RAILSClassifier is expecting 3"):
        _base.validate_rows(rails, torch.rand(2, 5))
