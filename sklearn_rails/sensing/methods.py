"""The table of the detectors' names, and what ``ThreatScorer(method=...)`` stands for."""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from .base import Detector
from .confidence import Confidence
from .conformity import Credibility, Disagreement
from .density import KernelDensity
from .distance import Distance, LocalIntrinsicDimensionality
from .mahalanobis import Mahalanobis
from .outliers import OutlierDetector
from .squeezing import FeatureSqueezing

DETECTORS: dict[str, type[Detector]] = {
    "credibility": Credibility,
    "disagreement": Disagreement,
    "distance": Distance,
    "kernel_density": KernelDensity,
    "mahalanobis": Mahalanobis,
    "lid": LocalIntrinsicDimensionality,
    "feature_squeezing": FeatureSqueezing,
    "confidence": Confidence,
}


def make_detectors(
    method: Any,
    rng: np.random.RandomState,
    layers: Mapping[Any, tuple[str, ...]] | None = None,
) -> dict[str, Detector]:
    """Create the detectors that a ``method`` other than ``"auto"`` stands for.

    Parameters
    ----------
    method : str, estimator, or list or tuple of these
        Names in the table, and outlier detectors with the interface of scikit-learn or PyOD.
    rng : numpy.random.RandomState
        Draws the seeds of outlier detectors.
    layers : mapping of str to tuple of str, default=None
        The layers of each method. None gives all layers to all.

    Returns
    -------
    dict of str to Detector
        An outlier detector's name is its class's in lower case, with a number where several
        methods would have the same.

    Raises
    ------
    ValueError
        If there is no method, one is not in the table, or one is named twice; or if ``layers`` has
        none for a method that scores layers, or some for another.
    TypeError
        If an object is no outlier detector that can score new samples.
    """
    methods = list(method) if isinstance(method, list | tuple) else [method]
    named = [m for m in methods if isinstance(m, str)]
    unknown = [m for m in named if m not in DETECTORS]
    if unknown or not methods or len(set(named)) < len(named):
        hints = [_hint(name) for name in unknown]
        raise ValueError(
            f"method={method!r} must be one of {sorted(DETECTORS)}, an outlier detector with the "
            "interface of scikit-learn or PyOD, such as IsolationForest(), or a list of one or "
            "more of these that names each once." + "".join(hints)
        )
    largest = np.iinfo(np.int32).max
    made = [
        DETECTORS[m]() if isinstance(m, str) else OutlierDetector(m, rng.randint(largest))
        for m in methods
    ]
    names = [m if isinstance(m, str) else type(m).__name__.lower() for m in methods]
    detectors = {}
    for i, (name, detector) in enumerate(zip(names, made, strict=True)):
        is_shared = not isinstance(methods[i], str) and names.count(name) > 1
        # As scikit-learn's make_pipeline and make_union number their steps.
        number = names[: i + 1].count(name)
        detectors[f"{name}-{number}" if is_shared else name] = detector
    if layers is not None:
        wanted = [name for name, detector in detectors.items() if detector.uses_layers]
        if set(layers) != set(wanted):
            raise ValueError(
                f"layers, a dict, must name those of {wanted}, the methods that score layers, and "
                f"of no others, got those of {list(layers)}."
            )
        for name in wanted:
            detectors[name].layers = layers[name]
    return detectors


def read_layers(layers: Mapping[Any, Any]) -> dict[Any, tuple[str, ...]]:
    """Check the layers that ``ThreatScorer(layers=...)`` gives to each method.

    Parameters
    ----------
    layers : mapping of str to str, or to list or tuple of str

    Returns
    -------
    dict of str to tuple of str

    Raises
    ------
    TypeError
        If layers are not named by strings.
    ValueError
        If a method has no layer, or the same one twice.
    """
    read = {}
    for method, names in layers.items():
        names = (names,) if isinstance(names, str) else names
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise TypeError(
                f"layers[{method!r}] must be the name of a layer or a list of these, got {names!r}."
            )
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"layers[{method!r}]={names!r} must name at least one layer, and each only once."
            )
        read[method] = tuple(names)
    return read


def _hint(name: str) -> str:
    if name == "auto":
        return " 'auto' cannot be in a list."
    closest = difflib.get_close_matches(name.lower(), DETECTORS, n=1)
    return f" Did you mean {closest[0]!r}?" if closest else ""
