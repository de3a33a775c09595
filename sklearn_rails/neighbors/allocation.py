"""Room for examples: memory, or a temporary file that is mapped into memory."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from typing import IO

import numpy as np
import torch
from torch import Tensor


def allocate_store(
    folder: str | os.PathLike[str] | None, shape: tuple[int, ...], like: Tensor
) -> Tensor:
    """Allocate memory for examples, or a file that is mapped into memory.

    Parameters
    ----------
    folder : path or None
        Holds a temporary file, which is deleted with the tensor. None is memory.
    shape : tuple of int
    like : torch.Tensor
        With the dtype, and the device if it is memory.

    Returns
    -------
    torch.Tensor

    Raises
    ------
    OSError
        If the folder's disk has not enough space, or the folder is gone.
    """
    if folder is None:
        return like.new_empty(shape)
    dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
    n_bytes = math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder, prefix="sklearn_rails_") as file:
            reserve(file, n_bytes)
            # The map outlives the file's name, and even its handle.
            return torch.from_numpy(np.memmap(file, dtype, "r+", shape=shape))
    except OSError as error:
        raise OSError(
            error.errno,
            f"storage={str(folder)!r} cannot take {n_bytes / 2**20:.1f} MiB of features: "
            f"{error.strerror}",
        ) from error


def reserve(file: IO[bytes], n_bytes: int) -> None:
    """Reserve space on the disk: writing to a map of a file that has none kills the process.

    Parameters
    ----------
    file : file object
        Open for writing, empty.
    n_bytes : int
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            return
        except OSError as error:
            # Not every file system can do it.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    zeros = bytes(min(n_bytes, 2**20))
    for start in range(0, n_bytes, len(zeros)):
        file.write(zeros[: n_bytes - start])
    file.flush()
