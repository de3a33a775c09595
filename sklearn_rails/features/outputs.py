"""The one tensor in what a layer returns, and the logits in that of the last."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.nn.functional import pad


class LayerError(ValueError):
    """A layer cannot be used; the message names it."""


def find_tensor(output: object) -> torch.Tensor | None:
    """Find the tensor that stands for a layer's output.

    Parameters
    ----------
    output : object

    Returns
    -------
    torch.Tensor or None
        The output itself, its ``logits``, or the only tensor in it; None if that is not clear.
    """
    if isinstance(output, torch.Tensor):
        return output
    values = _values(output)
    logits = values.get("logits")
    if isinstance(logits, torch.Tensor):
        return logits
    present = [value for value in values.values() if value is not None]
    is_clear = len(present) == 1 and isinstance(present[0], torch.Tensor)
    return present[0] if is_clear else None


def _values(output: Any) -> Mapping[Any, Any]:
    if isinstance(output, Mapping):
        return output
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        named: dict[str, Any] = output._asdict()
        return named
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    if is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    attributes: dict[str, Any] = getattr(output, "__dict__", {})
    return attributes


def replace_tensor(name: str, output: object, x: torch.Tensor) -> object:
    """Return a start layer's output with other values, in the form that the network expects.

    Parameters
    ----------
    name : str
        The layer, for the error.
    output : object
        What the layer returned.
    x : torch.Tensor
        The values.

    Returns
    -------
    object

    Raises
    ------
    LayerError
        If the output is not a tensor, or a tuple or list with one.
    """
    tensor = find_tensor(output)
    if tensor is None:
        raise LayerError(
            f"start_layer={name!r}: the network gives a {type(output).__name__} there, but cells "
            "need a layer that gives one tensor."
        )
    x = x.to(tensor.dtype)
    if isinstance(output, torch.Tensor):
        return x
    if isinstance(output, tuple | list) and not hasattr(output, "_fields"):
        return type(output)(x if value is tensor else value for value in output)
    raise LayerError(
        f"start_layer={name!r}: the network gives a {type(output).__name__} there, but cells need "
        "a layer that gives a tensor, or a tuple or list with one."
    )


def class_logits(outputs: torch.Tensor) -> torch.Tensor:
    """Return a logit for each class.

    Parameters
    ----------
    outputs : torch.Tensor of shape (n, n_outputs)
        Logits; a single one is that of the second of two classes.

    Returns
    -------
    torch.Tensor of shape (n, n_classes)
    """
    return outputs if outputs.shape[1] > 1 else pad(outputs, (1, 0))
