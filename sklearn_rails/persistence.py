"""Save estimators to files that cannot run code, and load them.

A file is a zip archive without compression: ``manifest.json`` has parameters, versions and what the
estimator consists of, ``arrays/*.npy`` its arrays, and ``networks/*.safetensors`` the weights of
its networks. The structure of a network is code, which is not saved: :func:`load` takes it as
``module``.
"""

from __future__ import annotations

import copy
import os
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import nn

from ._archive import ArchiveReader, replacing, write_array, write_bytes, write_manifest
from ._base import as_fitted
from ._encoding import ESTIMATORS, Decoder, Encoder
from ._rails import RAILSClassifier
from ._validation import naming
from ._version import __version__
from .features import FeatureMap, FrozenModule
from .features.contents import checksum
from .features.device import reraise_out_of_memory
from .features.follow import FollowedNetwork
from .features.frozen import as_module

FORMAT = 1


def save(estimator: BaseEstimator, path: str | os.PathLike[str]) -> None:
    """Save an estimator to a file that runs no code when it is loaded.

    The file is written beside ``path`` and renamed when it is complete. Until then, and if anything
    fails, an older file stays as it is.

    Parameters
    ----------
    estimator : RAILSClassifier, DkNNClassifier, ThreatScorer or TorchFeatureExtractor
        Fitted or not, with its threat scorer, gate and memory.
    path : path-like
        With any suffix.

    Raises
    ------
    TypeError
        If the estimator is another, or something in it cannot be saved without code: a callable
        affinity, an index or an outlier detector of another package, a detector of your own.
    OSError
        If the file cannot be written, for example since the disk is full.

    See Also
    --------
    load : Load the file.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from sklearn.datasets import load_digits
    >>> from sklearn_rails import DkNNClassifier
    >>> from sklearn_rails.persistence import load, save
    >>> X, y = load_digits(return_X_y=True)
    >>> dknn = DkNNClassifier(random_state=0).fit(X[:1000], y[:1000])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(dknn, Path(folder, "dknn.rails"))
    ...     loaded = load(Path(folder, "dknn.rails"))
    >>> bool((loaded.predict(X[1000:]) == dknn.predict(X[1000:])).all())
    True
    """
    if type(estimator) not in ESTIMATORS:
        names = ", ".join(cls.__name__ for cls in ESTIMATORS)
        raise TypeError(
            f"estimator must be one of {names}, got {type(estimator).__name__}. Pickle pipelines "
            "and searches, or save the estimator inside."
        )
    with naming("path"):
        path = Path(path)
        if "\0" in str(path):
            raise ValueError("it holds a null character.")
    encoder = Encoder(_network_names(estimator))
    root = encoder.encode(estimator, type(estimator).__name__)
    weights = [_weights(module) for module, _ in encoder.networks]
    with (
        replacing(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        arrays = [
            write_array(archive, f"arrays/{i}.npy", array) for i, array in enumerate(encoder.arrays)
        ]
        networks = [
            write_bytes(archive, f"networks/{i}.safetensors", content)
            | {
                "class": type(module).__name__,
                "parameter": name,
                "checksum": list(checksum(module)),
            }
            for i, ((module, name), content) in enumerate(
                zip(encoder.networks, weights, strict=True)
            )
        ]
        manifest = {
            "format": FORMAT,
            "class": type(estimator).__name__,
            "parameters": {k: repr(v) for k, v in estimator.get_params(deep=False).items()},
            "versions": {
                "sklearn_rails": __version__,
                "torch": str(torch.__version__),
                "numpy": np.__version__,
            },
            "arrays": arrays,
            "networks": networks,
            "objects": encoder.objects,
            "root": root,
        }
        write_manifest(archive, manifest)


def load(
    path: str | os.PathLike[str],
    module: Any = None,
    *,
    mmap_mode: str | None = None,
) -> Any:
    """Load an estimator that :func:`save` has written, without running code of the file.

    Checksums are compared, and a prediction is tried, so that a damaged file is refused at once.

    Parameters
    ----------
    path : path-like
        A file of :func:`save`.
    module : torch.nn.Module, fitted skorch net, FrozenModule or sequence of these, default=None
        The network, with any weights: a copy of it gets those of the file. Its names and shapes
        must be those that were saved, and its features those of ``fit``. Several networks come in
        the order in which the error for None names them. None for an estimator without a network.
    mmap_mode : {None, "r"}, default=None
        ``"r"`` maps the arrays from the file, which several processes then share, instead of
        reading them. Arrays are then not compared with their checksums, and nothing is tried out.
        The file may be replaced or deleted, as :func:`save` does it, but never written to or
        truncated in place: that ends the processes that map it.

    Returns
    -------
    RAILSClassifier, DkNNClassifier, ThreatScorer or TorchFeatureExtractor
        Fitted if the one that was saved was.

    Raises
    ------
    ValueError
        If the file is none of these, of another format, or damaged, or ``module`` does not fit it.
    TypeError
        If ``module`` is no network.
    OSError
        If the file cannot be read.
    MemoryError
        If what it holds, or a prediction, does not fit into memory.

    Warns
    -----
    UserWarning
        If the file was written by another version of sklearn_rails.

    See Also
    --------
    save : Write the file.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from pathlib import Path
    >>> from torch import nn
    >>> from sklearn_rails import TorchFeatureExtractor, load, save
    >>> X = np.random.default_rng(0).random((20, 4))
    >>> extractor = TorchFeatureExtractor(nn.Linear(4, 2)).fit(X)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(extractor, Path(folder, "extractor.rails"))
    ...     loaded = load(Path(folder, "extractor.rails"), nn.Linear(4, 2))
    >>> bool((loaded.transform(X) == extractor.transform(X)).all())
    True
    """
    if mmap_mode is not None and not (isinstance(mmap_mode, str) and mmap_mode == "r"):
        raise ValueError(f"mmap_mode={mmap_mode!r} must be None or 'r'.")
    modules = _as_list(module)
    with naming("path"):
        path = Path(path)
        opened = path.open("rb")
    with opened as file:
        reader = ArchiveReader(file, path, maps=mmap_mode == "r")
        _check_format(reader, path)
        reader.check_members()
        networks, changed = _load_networks(reader, path, modules)
        decoder = Decoder(reader.manifest["objects"], reader.read_array, networks)
        try:
            estimator = decoder.decode(reader.manifest["root"])
            if type(estimator) not in ESTIMATORS:
                raise TypeError(f"it holds a {type(estimator).__name__}")
            if mmap_mode is None:
                _try_out(estimator, decoder.decoded.values())
        except OSError:
            raise
        except Exception as error:
            reraise_out_of_memory(error)
            raise reader.fail(f"{type(error).__name__}: {error!s:.500}") from error
    for followed in decoder.decoded.values():
        if isinstance(followed, FollowedNetwork) and followed.module in changed:
            _check_features(followed, path)
    return estimator


def _as_list(module: Any) -> list[nn.Module]:
    modules = [] if module is None else module
    modules = list(modules) if isinstance(modules, list | tuple) else [modules]
    return [as_module(item) for item in modules]


def _network_names(estimator: BaseEstimator) -> dict[int, str]:
    """Return the parameters that hold networks, by the networks' ids; the outermost counts."""
    params = sorted(estimator.get_params(deep=True).items(), key=lambda item: -len(item[0]))
    return {id(v.module if isinstance(v, FrozenModule) else v): name for name, v in params}


def _weights(module: nn.Module) -> bytes:
    from safetensors.torch import save as to_bytes

    tensors = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"The network {type(module).__name__} has a state that is no tensor, {name!r}, "
                "which cannot be saved without code. Pickle the estimator instead."
            )
        # A copy, since safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
    content: bytes = to_bytes(tensors)
    return content


def _check_format(reader: ArchiveReader, path: Path) -> None:
    number = reader.manifest.get("format")
    if type(number) is int and number != FORMAT:
        versions = reader.manifest.get("versions")
        raise ValueError(
            f"{path} is of format {number}, written with {versions!r:.200}; sklearn_rails "
            f"{__version__} reads format {FORMAT}. Use the version that wrote it."
        )
    kinds = {"format": int, "objects": list, "root": dict}
    for name, kind in kinds.items():
        if not isinstance(reader.manifest.get(name), kind):
            raise reader.fail(f"the manifest has no {name}")


def _load_networks(
    reader: ArchiveReader, path: Path, modules: list[nn.Module]
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return copies of the networks with the weights of the file, and which of them differ else."""
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    wanted = reader.manifest["networks"]
    if len(wanted) != len(modules):
        listed = [f"{said.get('class')} ({said.get('parameter') or 'inside'})" for said in wanted]
        raise ValueError(
            f"{path} holds the weights of {len(wanted)} network(s), [{', '.join(listed)}], and "
            f"module gives {len(modules)}. Pass networks of the same structure, in this order."
        )
    networks, changed = [], []
    for said, given in zip(wanted, modules, strict=True):
        try:
            tensors = from_bytes(bytes(reader.read_bytes(said)))
        except SafetensorError as error:
            raise reader.fail(f"{said['name']}: {error}") from error
        network = copy.deepcopy(given)
        _set_weights(network, tensors, path)
        networks.append(network)
        if list(checksum(network)) != said.get("checksum"):
            changed.append(network)
    return networks, changed


def _set_weights(network: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    own = network.state_dict()
    shapes, saved = (
        {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
        for state in (own, tensors)
    )
    if shapes != saved:
        names = sorted(name for name in saved | shapes if saved.get(name) != shapes.get(name))
        differences = [
            f"{name} is {shapes.get(name, 'missing')}, in the file {saved.get(name, 'missing')}"
            for name in names[:3]
        ]
        raise ValueError(
            f"module is a {type(network).__name__} of another structure than the network that was "
            f"saved in {path}: {'; '.join(differences)}{', ...' if len(names) > 3 else ''}."
        )
    network.load_state_dict(tensors)


def _try_out(estimator: Any, objects: Collection[Any]) -> None:
    """Predict the samples that were probed in fit, and leave no trace of it."""
    maps = [obj for obj in objects if isinstance(obj, FeatureMap)]
    warned = [set(features._warned) for features in maps]
    samples = [
        o.samples for o in objects if isinstance(o, FollowedNetwork) and hasattr(o, "samples")
    ]
    if samples and hasattr(estimator, "n_features_in_"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(estimator, RAILSClassifier):  # a file must not start a compiler
                estimator = as_fitted(estimator)
                estimator.engine_ = estimator.engine_.without_compiling()
            for method in ("predict", "predict_with_alarm", "p_values", "transform"):
                if hasattr(estimator, method):
                    getattr(estimator, method)(samples[0])
    for features, topics in zip(maps, warned, strict=True):
        features._warned = topics


def _check_features(followed: FollowedNetwork, path: Path) -> None:
    if not followed.accept():
        raise ValueError(
            f"module is a {type(followed.module).__name__} of other settings than the network that "
            f"was saved in {path}: with the same weights it gives other features. Build it as it "
            "was built for fit."
        )
