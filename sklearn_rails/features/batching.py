"""Push rows through a network in micro-batches of one fixed shape."""

import torch

# Images a micro-batch on a CPU, where small batches stay in the caches, and on a GPU, which wants
# to be filled. Vectors cost little each, so that the call itself weighs more.
CPU_IMAGES, GPU_IMAGES, VECTORS = 64, 1024, 1024


def resolve_batch_size(batch_size, shape, device):
    """Turn the ``batch_size`` parameter into a number of rows.

    Parameters
    ----------
    batch_size : int or "auto"
    shape : tuple of int
        Shape of one row.
    device : torch.device

    Returns
    -------
    int
    """
    if batch_size != "auto":
        return int(batch_size)
    if len(shape) == 1:
        return VECTORS
    return CPU_IMAGES if device.type == "cpu" else GPU_IMAGES


def iterate_batches(x, batch_size):
    """Cut rows into micro-batches, the last one filled up with copies of its first row.

    A convolution's last bits depend on the shape of its batch, and selection amplifies them: with
    one shape for all, a row's features do not depend on the rows around it.

    Parameters
    ----------
    x : torch.Tensor of shape (n, ...)
    batch_size : int

    Yields
    ------
    rows : slice
        Where the micro-batch's rows stand in ``x``.
    batch : torch.Tensor of shape (batch_size, ...)
        The rows; only the first ``rows.stop - rows.start`` count.
    """
    for start in range(0, len(x), batch_size):
        batch = x[start : start + batch_size]
        n_rows = len(batch)
        if n_rows < batch_size:
            batch = torch.cat([batch, batch[:1].expand(batch_size - n_rows, *batch.shape[1:])])
        if batch.ndim == 4 and batch.device.type == "cpu":
            batch = batch.contiguous(memory_format=torch.channels_last)
        yield slice(start, start + n_rows), batch
