"""Predict on many machines, with Dask."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from tqdm.auto import tqdm

from ._compat import validate_parameter_constraints
from ._validation import as_array, naming

# Samples of a block, at most, and blocks that are under way for each thread of the workers: one
# that is computed, and one that waits for it.
LARGEST_BLOCK, BLOCKS_UNDER_WAY = 1024, 2

# If all workers that held the estimator are gone, it is sent again, so many times, after so many
# seconds at most until there is a worker.
MAX_RETRIES, WORKER_SECONDS = 3, 60


def predict(
    estimator: BaseEstimator,
    X: Any,
    client: Any = None,
    *,
    method: str = "predict",
    block_size: int | None = None,
    verbose: bool = True,
) -> Any:
    """Predict blocks of samples on the workers of a Dask cluster.

    The fitted estimator is sent to each worker once, network included. Predictions are those of one
    process, since they depend on nothing but the estimator and the sample.

    Parameters
    ----------
    estimator : estimator
        Fitted: any of this package, or a pipeline of them.
    X : ndarray or numpy.memmap of shape (n, n_features) or (n, *input_shape), or dask.array.Array
        Samples. Of an ndarray, a few blocks are under way at a time, so that a mapped file may be
        larger than memory. Blocks of a Dask array are its chunks.
    client : dask.distributed.Client, default=None
        None takes the current one.
    method : str, default="predict"
        Any method of the estimator that takes samples alone and returns an array for them, such as
        ``"predict_proba"``, ``"decision_function"``, ``"score_samples"`` or ``"transform"``; for an
        ndarray, also a tuple or a dict of arrays, as of ``"kneighbors"``.
    block_size : int, default=None
        Samples of a block of an ndarray. None takes 1,024, or fewer to occupy all workers.
    verbose : bool, default=True
        Whether a progress bar is shown for an ndarray.

    Returns
    -------
    ndarray, tuple or dict of these, or dask.array.Array
        What the method returns for all samples. A Dask array is not computed yet.

    Raises
    ------
    ValueError
        If there is no client or no worker, or the estimator has no such method.
    sklearn.exceptions.NotFittedError
        If the estimator is not fitted.
    ImportError
        If Dask is not installed.

    Notes
    -----
    If a worker dies, its blocks are computed by the others.

    Examples
    --------
    >>> from dask.distributed import Client
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import DkNNClassifier
    >>> from sklearn_rails.distributed import predict
    >>> X, y = load_digits(return_X_y=True)
    >>> dknn = DkNNClassifier(random_state=0).fit(X[:1000], y[:1000])
    >>> with Client(processes=False, dashboard_address=None) as client:
    ...     labels = predict(dknn, X[1000:], client, verbose=False)
    >>> bool((labels == dknn.predict(X[1000:])).all())
    True
    """
    with naming("estimator"):
        check_is_fitted(estimator)
    if not isinstance(method, str) or not callable(getattr(estimator, method, None)):
        raise ValueError(f"method={method!r} is no method of {type(estimator).__name__}.")
    validate_parameter_constraints(
        {"verbose": ["verbose"]}, {"verbose": verbose}, caller_name="predict"
    )
    _check_block_size(block_size)
    client = _find_client(client)
    n_threads = sum(client.nthreads().values())
    if not n_threads:
        raise ValueError(
            "client has no worker; start some, or wait for them with wait_for_workers."
        )
    if hasattr(X, "map_blocks"):
        return _predict_chunks(estimator, X, client, method)
    if isinstance(X, list | tuple | torch.Tensor):
        X = as_array(X, "X")
    if not hasattr(X, "__getitem__") or isinstance(X, str | bytes | Mapping):
        raise TypeError(f"X must be an array, got a {type(X).__name__}.")
    with naming("X"):
        n_samples = len(X)
    if n_samples == 0:
        return getattr(estimator, method)(X)  # which says what is wrong
    size = block_size or min(LARGEST_BLOCK, math.ceil(n_samples / (BLOCKS_UNDER_WAY * n_threads)))
    blocks = [slice(start, start + size) for start in range(0, n_samples, size)]
    answers: list[Any] = [None] * len(blocks)
    with tqdm(total=n_samples, desc=method, unit="sample", disable=not verbose) as bar:
        for number, answer in _run(estimator, X, client, method, blocks, n_threads):
            answers[number] = answer
            bar.update(len(range(*blocks[number].indices(n_samples))))
    return _join(answers)


def _check_block_size(block_size: Any) -> None:
    if block_size is not None and (not isinstance(block_size, Integral) or block_size < 1):
        raise ValueError(f"block_size={block_size!r} must be 1 or more, or None.")


def _find_client(client: Any) -> Any:
    try:
        from distributed import Client, default_client
    except ImportError as error:
        raise ImportError(
            "distributed.predict requires Dask. You can install it with "
            "`pip install sklearn-rails[dask]`."
        ) from error
    if client is not None:
        if not isinstance(client, Client):
            raise TypeError(
                f"client must be a dask.distributed.Client, got {type(client).__name__}."
            )
        return client
    try:
        return default_client()
    except ValueError as error:
        raise ValueError(
            "client=None takes the current client, but there is none: create a "
            "dask.distributed.Client first."
        ) from error


def _run(
    estimator: Any, X: Any, client: Any, method: str, blocks: list[slice], n_threads: int
) -> Iterator[tuple[int, Any]]:
    """Send blocks, few at a time, and yield the answers as they come."""
    from distributed import as_completed

    sent = _send_estimator(estimator, client)
    running: dict[Any, tuple[int, Any]] = {}
    waiting = iter(range(len(blocks)))
    done = as_completed()

    def send(number: int) -> None:
        # In turn, since else all blocks would wait for the worker that has the estimator; the
        # others fetch it from there.
        workers = sorted(client.nthreads())
        chosen = [workers[number % len(workers)]] if workers else None
        with naming("X"):
            rows = X[blocks[number]]
        future = client.submit(
            _answer,
            rows,
            sent,
            method,
            pure=False,
            workers=chosen,
            allow_other_workers=bool(chosen),
        )
        running[future] = number, sent
        done.add(future)

    for number in itertools.islice(waiting, BLOCKS_UNDER_WAY * n_threads):
        send(number)
    n_tries = 0
    for future in done:
        number, used = running.pop(future)
        try:
            answer = future.result()
        except CancelledError:  # all workers that held the estimator are gone
            if used is sent:
                n_tries += 1
                if n_tries > MAX_RETRIES:
                    raise
                sent = _send_estimator(estimator, client)
            send(number)
            continue
        del future
        yield number, answer
        following = next(waiting, None)
        if following is not None:
            send(following)


def _send_estimator(estimator: Any, client: Any) -> Any:
    """Send the estimator to a worker, and wait for one if there is none.

    Not to all of them: to broadcast waits forever if one of them dies meanwhile.
    """
    for is_last in (*(False,) * MAX_RETRIES, True):
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
        try:
            return client.scatter(estimator, hash=False)
        except OSError:  # the worker is gone, and the scheduler does not know it yet
            if is_last:
                raise
            time.sleep(1)


def _answer(rows: Any, estimator: Any, method: str) -> Any:
    return getattr(estimator, method)(as_array(rows, "X"))


def _join(answers: list[Any]) -> Any:
    """Join the answers for blocks to that for all samples."""
    first = answers[0]
    if isinstance(first, tuple):
        return tuple(_join(list(parts)) for parts in zip(*answers, strict=True))
    if isinstance(first, dict):
        return {key: _join([answer[key] for answer in answers]) for key in first}
    return np.concatenate(answers)


def _predict_chunks(estimator: Any, X: Any, client: Any, method: str) -> Any:
    """Return the answers for the chunks of a Dask array, as one that is not computed yet."""
    one: NDArray[Any] = np.asarray(getattr(estimator, method)(X[:1].compute()))
    if one.dtype == object or one.shape[:1] != (1,):
        raise ValueError(f"method={method!r} must return an array for a dask array X.")
    X = X.rechunk(dict.fromkeys(range(1, X.ndim), -1))
    sent = _send_estimator(estimator, client)
    chunks = (X.chunks[0], *((size,) for size in one.shape[1:]))
    return X.map_blocks(
        _answer,
        sent,
        method,
        dtype=one.dtype,
        chunks=chunks,
        drop_axis=list(range(one.ndim, X.ndim)),
        new_axis=list(range(X.ndim, one.ndim)) or None,
        meta=one[:0],
    )
