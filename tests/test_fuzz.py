"""Bad input by the thousand: it works and what comes back is valid, or the error names what is bad.

Every public constructor, method and function is called with the strange things of ``fuzzing``. An
exception of a callable of the user's may pass through unchanged.
"""

import collections
import functools
import itertools
from collections.abc import Mapping

import matplotlib
import numpy as np
import pytest
import torch
from dask.distributed import Client
from fuzzing import (
    ALL_LABELS,
    ALL_SAMPLES,
    PARAMETERS,
    RETURNS,
    SAME_LABELS,
    SAME_SAMPLES,
    Case,
    bounds_of,
    fault_of,
    group,
    limited_memory,
    require,
    shallow,
)
from sklearn.base import BaseEstimator, clone, is_classifier
from torch import nn
from torch.utils.data import DataLoader

from sklearn_rails import (
    DkNNClassifier,
    FrozenModule,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
    load,
    save,
)
from sklearn_rails.attacks import AdaptiveKNNAttack, pgd
from sklearn_rails.datasets import fetch_image_benchmark, load_digit_images
from sklearn_rails.distributed import predict as predict_elsewhere
from sklearn_rails.features import choose_layers
from sklearn_rails.immune import Arbitration, ImmuneResponse, Triage
from sklearn_rails.inspection import (
    AffinityCurveDisplay,
    ImmuneResponseDisplay,
    LayerDisplay,
    ThreatDisplay,
)
from sklearn_rails.metrics import (
    detection_scores,
    fpr_at_tpr_score,
    make_robust_scorer,
    robust_accuracy_score,
    tpr_at_fpr_score,
)
from sklearn_rails.neighbors import ClassNeighbors, ExactNeighbors

matplotlib.use("Agg")

# Sixteenths, which every float type holds.
RNG = np.random.default_rng(0)
Y = np.arange(24) % 3
X = np.clip(Y[:, None] * 5 + RNG.integers(0, 7, size=(24, 16)), 0, 16).astype(np.float32) / 16
IMAGES = (1, 4, 4)
SMALL = {"population_size": 9, "generations": 2, "n_neighbors": 3, "random_state": 0}


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


VECTORS = seeded(lambda: nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)))
CONVOLUTION = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)))
TOKENS = seeded(lambda: nn.Sequential(nn.Embedding(20, 2), nn.Flatten(), nn.Linear(32, 3)))
METHODS_OF_SCORER = ["credibility", "disagreement", "distance", "kernel_density", "mahalanobis"]
SCORER = {"random_state": 0, "n_neighbors": 4, "alpha": 0.2}

ESTIMATORS = {
    "DkNN": DkNNClassifier(n_neighbors=5, random_state=0),
    "DkNN of vectors": DkNNClassifier(VECTORS, layers=["0", "2"], n_neighbors=5, random_state=0),
    "DkNN of images": DkNNClassifier(
        CONVOLUTION, layers="0", n_neighbors=1, calibration="leave-one-out", input_shape=IMAGES
    ),
    "DkNN of tokens": DkNNClassifier(TOKENS, layers="1", n_neighbors=5, random_state=0),
    "RAILS": RAILSClassifier(**SMALL),
    "RAILS of vectors": RAILSClassifier(
        VECTORS, layers="0", gate=Arbitration(alpha=0.3), early_stopping=False, **SMALL
    ),
    "RAILS with alarms": RAILSClassifier(
        VECTORS,
        layers="1",
        gate=Triage(),
        affinity="cosine",
        threat_scorer=ThreatScorer(method=["distance", "lid"], **SCORER),
        **SMALL,
    ),
    "RAILS of images": RAILSClassifier(
        CONVOLUTION, layers="1", start_layer="0", input_shape=IMAGES, **SMALL
    ),
    "scorer": ThreatScorer(**SCORER),
    "scorer of vectors": ThreatScorer(VECTORS, layers="1", method=METHODS_OF_SCORER, **SCORER),
    "scorer of images": ThreatScorer(
        CONVOLUTION, layers="0", method=["feature_squeezing"], input_shape=IMAGES, **SCORER
    ),
    "extractor": TorchFeatureExtractor(),
    "extractor of vectors": TorchFeatureExtractor(VECTORS, layers="0"),
    "extractor of images": TorchFeatureExtractor(CONVOLUTION, layers="0", input_shape=IMAGES),
}


@functools.cache
def fitted(name):
    return clone(ESTIMATORS[name]).fit(plain_samples(name), Y)


@functools.cache
def pictures():
    return RAILSClassifier(CONVOLUTION, layers="0", input_shape=IMAGES, **SMALL).fit(X, Y)


def samples_for(name):
    return X * 16 if "tokens" in name else X


def plain_samples(name):
    return (X * 16).astype(int) if "tokens" in name else X


# ---- What is valid ----


def sound(method, estimator, result, n):
    """Check what a method has returned for n samples."""
    if method == "score":
        require(0 <= result <= 1, "score is not in [0, 1]")
    elif method == "respond":
        require(result.proba.shape[0] == n, "other number of responses")
        sound("predict_proba", estimator, result.proba, n)
        sound("predict", estimator, result.labels, n)
        for affinity in result.plasma_affinity.values():
            require(not np.isnan(affinity).any(), "plasma_affinity is NaN")
    elif method == "kneighbors":
        for layer, distances in result[0].items():
            indices = result[1][layer]
            require(distances.shape[0] == n and not np.isnan(distances).any(), "distances")
            require((np.isfinite(distances) == (indices >= 0)).all(), "distances and indices")
    elif method == "predict_with_alarm":
        sound("predict", estimator, result[0], n)
        require(result[1].shape == (n,) and result[1].dtype == bool, "alarms")
    elif method in ("predict", "fit_predict"):
        classes = estimator.classes_ if is_classifier(estimator) else [-1, 1]
        require(result.shape == (n,) and np.isin(result, classes).all(), "labels")
    else:
        result = np.asarray(result.detach() if isinstance(result, torch.Tensor) else result)
        require(result.shape[0] == n, "other number of rows")
        require(np.isfinite(result).all(), "not finite")
        if method in ("predict_proba", "p_values"):
            require(result.shape == (n, len(estimator.classes_)), "shape")
            require((result >= 0).all() and (result <= 1).all(), "not in [0, 1]")
        if method == "predict_proba":
            require(np.allclose(result.sum(axis=1), 1), "probabilities do not sum to 1")
        if method in ("credibility", "confidence"):
            require(result.shape == (n,) and (result >= 0).all() and (result <= 1).all(), "shape")


def flat(result):
    """Everything in a result as one list of arrays."""
    if isinstance(result, ImmuneResponse):
        return [result.proba, *flat(result.plasma), *flat(result.affinity_curve)]
    if isinstance(result, Mapping):
        return [array for value in result.values() for array in flat(value)]
    if isinstance(result, tuple):
        return [array for value in result for array in flat(value)]
    return [np.asarray(result.detach() if isinstance(result, torch.Tensor) else result)]


def equal(result, expected):
    """Check for the result that the same samples gave in plain form."""
    for one, other in zip(flat(result), flat(expected), strict=True):
        require(one.shape == other.shape, "another shape than for the plain array")
        if one.dtype.kind in "biuf":
            close = np.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
        else:
            close = (one == other).all()
        require(close, "another result than for the plain array")


def number_of(samples, n):
    samples = samples.dataset if isinstance(samples, DataLoader) else samples
    if isinstance(samples, torch.Tensor) and samples.is_nested:
        return n
    shape = getattr(samples, "shape", None)
    with_length = shape is None and hasattr(samples, "__len__")
    return shape[0] if isinstance(shape, tuple) and shape else len(samples) if with_length else n


METHODS = {
    "DkNN": [
        "predict",
        "predict_proba",
        "p_values",
        "credibility",
        "confidence",
    ],
    "RAILS": ["predict", "predict_proba", "decision_function", "kneighbors", "respond"],
    "scorer": ["predict", "transform", "score_samples", "decision_function"],
    "extractor": ["transform"],
}


@functools.cache
def plain_result(name, method):
    estimator = fitted(name)
    if method == "score":
        return estimator.score(samples_for(name), Y)
    return getattr(estimator, method)(samples_for(name))


def sample_cases():
    """Strange samples for the methods of the estimators: all of the first of each kind."""
    for name, estimator in ESTIMATORS.items():
        kind = name.split()[0]
        methods = METHODS[kind] if name == kind else METHODS[kind][:1]
        if name == "RAILS with alarms":
            methods = ["predict_with_alarm"]
        if is_classifier(estimator) and name == kind:
            methods = [*methods, "score"]
        for method, maker in itertools.product(methods, ALL_SAMPLES):
            yield case_of_method(name, method, maker)
        fits = ["fit"]
        if name == kind:
            fits += {"scorer": ["fit_predict"], "extractor": ["fit_transform"]}.get(kind, [])
        if kind == "RAILS":
            fits += ["partial_fit"]
        for method, maker in itertools.product(fits, ALL_SAMPLES):
            yield case_of_fit(name, method, maker)


def case_of_method(name, method, maker):
    is_same = maker in SAME_SAMPLES

    def use(samples):
        call = getattr(fitted(name), method)
        result = call(samples, Y) if method == "score" else call(samples)
        sound(method, fitted(name), result, number_of(samples, len(X)))
        if is_same:
            equal(result, plain_result(name, method))

    return Case(
        f"{name}.{method}",
        maker,
        use,
        ("X",),
        lambda: ALL_SAMPLES[maker](samples_for(name)),
        fitted(name),
    )


def case_of_fit(name, method, maker):
    twin = shallow(fitted(name))
    is_same = maker in SAME_SAMPLES
    asked = METHODS[name.split()[0]][0]

    def use(samples):
        result = getattr(twin, method)(samples, Y)
        if method in ("fit_predict", "fit_transform"):
            sound(method, twin, result, number_of(samples, len(X)))
        if len(X) != number_of(samples, len(X)) and is_classifier(twin):
            require(False, "takes another number of samples than labels")
        if method == "partial_fit" or maker == "shuffling loader":
            return
        sound(asked, twin, getattr(twin, asked)(samples), number_of(samples, len(X)))
        if is_same:
            equal(getattr(twin, asked)(samples), plain_result(name, asked))

    return Case(
        f"{name}.{method}",
        maker,
        use,
        ("X", "feature_extractor", "module"),
        lambda: ALL_SAMPLES[maker](samples_for(name)),
        twin,
    )


def label_cases():
    """Strange labels for every method that takes any."""
    for name, maker in itertools.product(ESTIMATORS, ALL_LABELS):
        if "extractor" in name:
            continue
        twin = shallow(fitted(name))

        def fit(labels, name=name, twin=twin, maker=maker):
            twin.fit(plain_samples(name), labels)
            sound_labels(twin, name)
            if maker in SAME_LABELS:
                asked = METHODS[name.split()[0]][0]
                equal(getattr(twin, asked)(plain_samples(name)), plain_result(name, asked))

        many = ("population_size", "memory_capacity")  # too small for that many classes
        yield labelled(f"{name}.fit", maker, fit, ("y", *many), twin)
        if not is_classifier(twin):
            continue

        def score(labels, name=name, maker=maker):
            result = fitted(name).score(plain_samples(name), labels)
            sound("score", fitted(name), result, len(X))
            if maker in SAME_LABELS:
                equal(result, plain_result(name, "score"))

        def weigh(weights, name=name):
            score = fitted(name).score(plain_samples(name), Y, sample_weight=weights)
            require(np.isfinite(score), "score is not finite")

        if name in METHODS:
            yield labelled(f"{name}.score", maker, score, ("y",), fitted(name))
            yield labelled(f"{name}.score weights", maker, weigh, ("sample_weight",), fitted(name))
        if "RAILS" not in name:

            def calibrate(labels, name=name, twin=twin):
                twin.calibration = (plain_samples(name), labels)
                twin.fit(plain_samples(name), Y)
                sound_labels(twin, name)

            yield labelled(f"{name}.fit calibration", maker, calibrate, ("calibration",))
            continue

        def partial(labels, name=name, twin=twin):
            twin.partial_fit(plain_samples(name), labels)
            sound_labels(twin, name)

        def classes(labels, name=name, twin=twin):
            twin.partial_fit(plain_samples(name), Y, classes=labels)
            sound_labels(twin, name)

        remembering = shallow(fitted(name))

        def remember(labels, name=name, twin=remembering):
            twin.remember(response(name), labels)
            sound_labels(twin, name)

        yield labelled(f"{name}.partial_fit", maker, partial, ("y", *many), twin)
        yield labelled(f"{name}.partial_fit classes", maker, classes, ("classes", *many), twin)
        yield labelled(f"{name}.remember", maker, remember, ("y",), remembering)


def labelled(target, maker, use, names, guarded=None):
    return Case(target, maker, use, names, lambda: ALL_LABELS[maker](Y), guarded)


@functools.cache
def response(name):
    return fitted(name).respond(samples_for(name))


def sound_labels(estimator, name):
    samples = samples_for(name)
    if is_classifier(estimator):
        classes = estimator.classes_
        require(len(set(map(str, classes.tolist()))) == len(classes), "classes are not unique")
        sound("predict_proba", estimator, estimator.predict_proba(samples), len(X))
    sound("predict", estimator, estimator.predict(samples), len(X))


# ---- Functions ----


def share(score):
    require(0 <= score <= 1, "not in [0, 1]")


def finite(array, shape=None):
    result = np.asarray(array.detach() if isinstance(array, torch.Tensor) else array)
    require(np.isfinite(result).all(), "not finite")
    require(shape is None or result.shape == shape, "shape")


def closed(display):
    import matplotlib.pyplot as plt

    require(str(display), "no repr")
    plt.close("all")


@functools.cache
def attack():
    return AdaptiveKNNAttack(fitted("DkNN of vectors"), X, Y, **ATTACK)


PGD = {"eps": 0.1, "max_iter": 2}
ATTACK = {"eps": 0.1, "max_iter": 2, "n_restarts": 2, "random_state": 0}
THREAT = RNG.random(24)
LARGE = np.concatenate([X, X, X])
LARGE_Y = np.concatenate([Y, Y, Y])


@functools.cache
def client():
    return Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None)


def predicts_elsewhere(**parameters):
    given = {"estimator": fitted("DkNN"), "X": X[:4], "client": client(), "verbose": False}
    predict_elsewhere(**given | parameters)


def functions_of_samples():
    dknn, rails = fitted("DkNN of vectors"), pictures()
    return {
        "pgd": (
            ("X", "network"),
            lambda v: finite(pgd(VECTORS, v, **PGD, clip=None)),
        ),
        "pgd clip": (
            ("X", "clip", "network"),
            lambda v: finite(pgd(VECTORS, v, Y, **PGD)),
        ),
        "pgd of images": (
            ("X", "network"),
            lambda v: finite(pgd(CONVOLUTION, v, eps=0, input_shape=IMAGES, clip=None)),
        ),
        "AdaptiveKNNAttack": (
            ("X_train", "clip"),
            lambda v: finite(AdaptiveKNNAttack(dknn, v, Y, **ATTACK).generate(X[:2], Y[:2])),
        ),
        "AdaptiveKNNAttack.generate": (
            ("X",),
            lambda v: finite(attack().generate(v, Y[: number_of(v, 24)])),
        ),
        "choose_layers": (
            ("X", "network"),
            lambda v: choose_layers(VECTORS, v, LARGE_Y, random_state=0),
        ),
        "distributed.predict": (("X",), lambda v: predicts_elsewhere(X=v)),
        "robust scorer": (
            ("X",),
            lambda v: share(make_robust_scorer(lambda network, X, y: X)(dknn, v, Y)),
        ),
        "attack of a robust scorer": (
            ("attack",),
            lambda v: share(make_robust_scorer(lambda network, X, y: v)(dknn, X, Y)),
        ),
        "AffinityCurveDisplay.from_estimator": (
            ("X",),
            lambda v: closed(AffinityCurveDisplay.from_estimator(rails, v)),
        ),
        "ImmuneResponseDisplay.from_estimator": (
            ("X",),
            lambda v: closed(ImmuneResponseDisplay.from_estimator(rails, v)),
        ),
        "LayerDisplay.from_estimator": (
            ("X",),
            lambda v: closed(LayerDisplay.from_estimator(dknn, v, Y, X, layers="0")),
        ),
        "LayerDisplay.from_estimator attack": (
            ("attack",),
            lambda v: callable(v) or closed(LayerDisplay.from_estimator(dknn, X, Y, v, layers="0")),
        ),
        "ThreatDisplay.from_estimator": (
            ("X",),
            lambda v: closed(ThreatDisplay.from_estimator(fitted("scorer"), v, X)),
        ),
        "ThreatDisplay.from_estimator attacked": (
            ("X_attacked",),
            lambda v: closed(ThreatDisplay.from_estimator(fitted("scorer"), X, v)),
        ),
        "DkNN calibration": (
            ("calibration", "X"),
            lambda v: fits_and_predicts("DkNN", calibration=(v, Y)),
        ),
        "AffinityCurveDisplay curves": (
            ("curves", "layer"),
            lambda v: closed(AffinityCurveDisplay({"a": v}, layer="input").plot()),
        ),
    }


def functions_of_labels():
    dknn, rails = fitted("DkNN of vectors"), pictures()
    flags = np.arange(24) % 2
    return {
        "pgd y": (("y",), lambda v: finite(pgd(VECTORS, X, v, **PGD))),
        "AdaptiveKNNAttack y_train": (
            ("y_train",),
            lambda v: finite(AdaptiveKNNAttack(dknn, X, v, **ATTACK).generate(X[:2], Y[:2])),
        ),
        "AdaptiveKNNAttack.generate y": (("y",), lambda v: finite(attack().generate(X, v))),
        "choose_layers y": (
            ("y",),
            lambda v: choose_layers(VECTORS, LARGE, v, random_state=0),
        ),
        "robust scorer y": (
            ("y",),
            lambda v: share(make_robust_scorer(lambda network, X, y: X)(dknn, X, v)),
        ),
        "robust_accuracy_score": (("y_true",), lambda v: share(robust_accuracy_score(v, Y))),
        "robust_accuracy_score attacked": (
            ("y_attacked", "y_attacked[1]"),
            lambda v: share(robust_accuracy_score(Y, Y, v)),
        ),
        "robust_accuracy_score weights": (
            ("sample_weight",),
            lambda v: share(robust_accuracy_score(Y, Y, sample_weight=v)),
        ),
        "fpr_at_tpr_score": (("y_true",), lambda v: share(fpr_at_tpr_score(v, THREAT))),
        "fpr_at_tpr_score threat": (("threat",), lambda v: share(fpr_at_tpr_score(flags, v))),
        "tpr_at_fpr_score": (("y_true",), lambda v: share(tpr_at_fpr_score(v, THREAT))),
        "tpr_at_fpr_score threat": (("threat",), lambda v: share(tpr_at_fpr_score(flags, v))),
        "detection_scores": (
            ("y_true",),
            lambda v: [share(s) for s in detection_scores(v, THREAT).values()],
        ),
        "detection_scores threat": (
            ("threat",),
            lambda v: [share(s) for s in detection_scores(flags, v).values()],
        ),
        "ImmuneResponseDisplay y": (
            ("y",),
            lambda v: closed(ImmuneResponseDisplay.from_estimator(rails, X[:3], y=v)),
        ),
        "ImmuneResponseDisplay network_labels": (
            ("network_labels",),
            lambda v: closed(ImmuneResponseDisplay.from_estimator(rails, X[:3], network_labels=v)),
        ),
        "LayerDisplay y": (
            ("y",),
            lambda v: closed(LayerDisplay.from_estimator(dknn, X, v, X, layers="0")),
        ),
        "ThreatDisplay threat": (
            ("threat",),
            lambda v: closed(ThreatDisplay.from_predictions(v, THREAT)),
        ),
        "ThreatDisplay threat_attacked": (
            ("threat_attacked", "attacked"),
            lambda v: closed(ThreatDisplay.from_predictions(THREAT, v)),
        ),
    }


def function_cases():
    for target, (names, use) in functions_of_samples().items():
        base = LARGE if target == "choose_layers" else X
        if target == "ImmuneResponseDisplay.from_estimator":
            base = X[:2]
        for maker in ALL_SAMPLES:
            yield Case(
                target,
                maker,
                use,
                names,
                lambda maker=maker, base=base: ALL_SAMPLES[maker](base),
                draws="random" if "distributed" in target else "",  # by dask
            )
    for target, (names, use) in functions_of_labels().items():
        base = {"choose_layers y": LARGE_Y}.get(target, Y[:3] if "Response" in target else Y)
        for maker in ALL_LABELS:
            yield Case(
                target, maker, use, names, lambda maker=maker, base=base: ALL_LABELS[maker](base)
            )


def data_cases():
    yield from sample_cases()
    yield from label_cases()
    yield from function_cases()


# ---- Parameters ----

# More of these means more work, which nobody waits for.
WORK = ("generations", "max_iter", "n_restarts", "n_seeds", "n_checks", "n_references", "refresh")
LONG = [*WORK, "population_size", "n_jobs"]


def is_long(parameter, make):
    if parameter == "compile":  # takes a minute
        return isinstance(make(), bool | np.bool_) and bool(make())
    return parameter in LONG and isinstance(make(), int) and abs(make()) > 100


# With another of these the layers that are named may be missing.
NETWORKS = ("feature_extractor", "module")

# Parameters that mean most where there is a network.
OF_NETWORKS = (
    *NETWORKS,
    "layers",
    "input_shape",
    "device",
    "dtype",
    "batch_size",
    "method",
    "gate",
)

BASES = {
    "RAILSClassifier": ("RAILS", "RAILS of vectors"),
    "DkNNClassifier": ("DkNN", "DkNN of vectors"),
    "ThreatScorer": ("scorer", "scorer of vectors"),
    "TorchFeatureExtractor": ("extractor", "extractor of vectors"),
}


def values_of(estimator, parameter):
    """Names of the values for a parameter of an estimator, and a function that makes them anew."""
    constraints = getattr(estimator, "_parameter_constraints", {}).get(parameter, [])
    constraints = [] if isinstance(constraints, str) else constraints
    bounds = {}
    for constraint in constraints:
        bounds |= bounds_of(constraint)
    return {k: (lambda v=v: v) for k, v in bounds.items()} | PARAMETERS


def fits_and_predicts(name, **parameters):
    estimator = type(ESTIMATORS[name])(**ESTIMATORS[name].get_params(deep=False) | parameters)
    samples = samples_for(name)
    estimator.fit(samples, Y)
    method = METHODS[name.split()[0]][-1 if "scorer" in name else 0]
    sound(method, estimator, getattr(estimator, method)(samples), len(X))
    if is_classifier(estimator):
        sound("predict_proba", estimator, estimator.predict_proba(samples), len(X))


# The global generator that None, and dask, draw from.
DRAWN_FROM = {"random_state": "numpy", "random_start": "numpy"}


def parameter_cases():
    for cls, (plain, of_vectors) in BASES.items():
        for parameter in ESTIMATORS[plain].get_params(deep=False):
            name = of_vectors if parameter in OF_NETWORKS else plain
            for maker, make in values_of(ESTIMATORS[name], parameter).items():
                if not is_long(parameter, make):
                    yield Case(
                        f"{cls}({parameter}=)",
                        maker,
                        lambda v, name=name, p=parameter: fits_and_predicts(name, **{p: v}),
                        (parameter, "layers") if parameter in NETWORKS else (parameter,),
                        make,
                        draws="numpy" if parameter == "random_state" else "",
                    )
    yield from pair_cases()
    for target, (names, use) in functions_of_parameters().items():
        for maker, make in PARAMETERS.items():
            if not is_long(names[0], make):
                yield Case(
                    target,
                    maker,
                    use,
                    names,
                    make,
                    draws=DRAWN_FROM.get(names[0], "random" if "distributed" in target else ""),
                    errors=(ValueError, TypeError, MemoryError, OSError),
                )


PLAIN = [
    *("None", "True", "False", "0", "1", "2", "3", "0.5", "1.0", "inf", "1e300", "1e-300", "2**31"),
    *("np.int64(2)", "np.float32(0.5)", "'auto'", "'input'", "'output'", "'float64'", "(0, 1)"),
    *("(1, 0)", "(0.0, 2.0)", "(1, 4, 4)", "(16,)", "5e-324", "1e30", "np.uint8(2)"),
]


def pair_cases(n_pairs=1500):
    """Two parameters at a time, of values that one of them alone may take."""
    rng = np.random.default_rng(0)
    names = [name for pair in BASES.values() for name in pair if "extractor" not in name]
    for _ in range(n_pairs):
        name = names[rng.integers(len(names))]
        estimator = ESTIMATORS[name]
        pair = rng.choice(sorted(estimator.get_params(deep=False)), 2, replace=False)
        pair = [str(parameter) for parameter in pair]
        makers = []
        for parameter in pair:
            values = values_of(estimator, parameter)
            plain = [k for k in values if k in PLAIN or k.startswith("bound")]
            makers.append((k := plain[rng.integers(len(plain))], values[k]))
        if any(is_long(p, make) for p, (_, make) in zip(pair, makers, strict=True)):
            continue

        def use(values, name=name, pair=pair):
            fits_and_predicts(name, **dict(zip(pair, values, strict=True)))

        yield Case(
            f"{type(estimator).__name__}({'=, '.join(pair)}=)",
            ", ".join(maker for maker, _ in makers),
            use,
            (*pair, "layers") if set(pair) & set(NETWORKS) else tuple(pair),
            lambda makers=makers: [make() for _, make in makers],
            draws="numpy" if "random_state" in pair else "",
        )


def keyword(function, *args, **fixed):
    """A function of one keyword's value."""
    return lambda name: lambda v: function(*args, **fixed | {name: v})


def functions_of_parameters():
    dknn, rails = fitted("DkNN of vectors"), pictures()
    few_images = X[:2]

    def attack_by(**parameters):
        finite(pgd(VECTORS, X, Y, **PGD | parameters))

    def attack_adaptively(**parameters):
        estimator = parameters.pop("estimator", dknn)
        finite(AdaptiveKNNAttack(estimator, X, Y, **ATTACK | parameters).generate(X[:2], Y[:2]))

    def choose(**parameters):
        network = parameters.pop("network", VECTORS)
        choose_layers(network, LARGE, LARGE_Y, **{"random_state": 0} | parameters)

    def neighbors(**parameters):
        index = ClassNeighbors(**parameters).fit(torch.tensor(X), Y, 3)
        affinity, places = index.kneighbors(torch.tensor(X[:3]), 2)
        require(((places >= 0) == affinity.isfinite()).all(), "places")

    def neighbors_fit(**parameters):
        given = {"features": torch.tensor(X), "y": Y, "n_classes": 3} | parameters
        index = ClassNeighbors().fit(**given)
        index.kneighbors(torch.tensor(X[:3]), 2)

    def kneighbors(**parameters):
        given = {"queries": torch.tensor(X[:3]), "n_neighbors": 2} | parameters
        index = ClassNeighbors().fit(torch.tensor(X), Y, 3)
        affinity, _ = index.kneighbors(**given)
        require(not affinity.isnan().any(), "NaN")

    def remembers(**parameters):
        twin = shallow(fitted("RAILS"))
        twin.remember(**{"response": response("RAILS")} | parameters)
        sound_labels(twin, "RAILS")

    def digits(**parameters):
        bunch = load_digit_images(**parameters)
        require(len(bunch.X_train) + len(bunch.X_test) <= 1797, "images")

    def saves(**parameters):
        save(**{"estimator": dknn, "path": "saved.rails"} | parameters)

    def loads(**parameters):
        save(dknn, "dknn.rails")
        found = load(**{"path": "dknn.rails", "module": VECTORS} | parameters)
        equal(found.predict(X), plain_result("DkNN of vectors", "predict"))

    def weighs(**parameters):
        share(tpr_at_fpr_score(np.arange(24) % 2, THREAT, **parameters))

    def weighs_fpr(**parameters):
        share(fpr_at_tpr_score(np.arange(24) % 2, THREAT, **parameters))

    def gates(**parameters):
        fits_and_predicts("RAILS of vectors", gate=Arbitration(**parameters))

    def stores(**parameters):
        fits_and_predicts("RAILS", algorithm=ExactNeighbors(**parameters))

    def draws_curves(**parameters):
        estimator = parameters.pop("estimator", rails)
        closed(AffinityCurveDisplay.from_estimator(estimator, few_images, **parameters))

    def draws_curves_of(**parameters):
        given = {"response": response("RAILS")} | parameters
        closed(AffinityCurveDisplay.from_response(**given))

    def draws_responses(**parameters):
        estimator = parameters.pop("estimator", rails)
        closed(ImmuneResponseDisplay.from_estimator(estimator, few_images, **parameters))

    def draws_layers(**parameters):
        given = {"estimator": dknn, "attack": X, "layers": "0"} | parameters
        closed(LayerDisplay.from_estimator(given.pop("estimator"), X, Y, **given))

    def draws_threat(**parameters):
        closed(ThreatDisplay.from_predictions(THREAT, THREAT, **parameters))

    def draws_threat_of(**parameters):
        closed(ThreatDisplay.from_estimator(**{"X": X, "X_attacked": X} | parameters))

    table = {
        "pgd": (attack_by, [*pgd.__kwdefaults__, "eps"]),
        "AdaptiveKNNAttack": (
            attack_adaptively,
            [*AdaptiveKNNAttack.__init__.__kwdefaults__, "eps", "estimator"],
        ),
        "choose_layers": (choose, [*choose_layers.__kwdefaults__, "network"]),
        "ClassNeighbors": (neighbors, ["affinity", "algorithm", "n_jobs"]),
        "ClassNeighbors.fit": (neighbors_fit, ["features", "y", "n_classes"]),
        "ClassNeighbors.kneighbors": (kneighbors, ["queries", "n_neighbors"]),
        "RAILSClassifier.remember": (remembers, ["response", "confidence"]),
        "load_digit_images": (digits, ["test_size", "random_state"]),
        "fetch_image_benchmark": (fetch_image_benchmark, ["name"]),
        "distributed.predict": (
            predicts_elsewhere,
            ["estimator", "client", "method", "block_size", "verbose"],
        ),
        "save": (saves, ["estimator", "path"]),
        "load": (loads, ["path", "module", "mmap_mode"]),
        "FrozenModule": (FrozenModule, ["module"]),
        "make_robust_scorer": (make_robust_scorer, ["attack"]),
        "tpr_at_fpr_score": (weighs, ["fpr"]),
        "fpr_at_tpr_score": (weighs_fpr, ["tpr"]),
        "Arbitration": (gates, ["alpha"]),
        "ExactNeighbors": (stores, ["storage"]),
        "AffinityCurveDisplay.from_estimator": (
            draws_curves,
            ["estimator", "layer", "confidence", "ax"],
        ),
        "AffinityCurveDisplay.from_response": (draws_curves_of, ["response", "layer"]),
        "ImmuneResponseDisplay.from_estimator": (
            draws_responses,
            ["estimator", "layer", "n_plasma", "cmap", "figure"],
        ),
        "LayerDisplay.from_estimator": (draws_layers, ["estimator", "layers", "attack", "ax"]),
        "ThreatDisplay.from_predictions": (draws_threat, ["threshold", "axes"]),
        "ThreatDisplay.from_estimator": (draws_threat_of, ["estimator"]),
    }
    return {
        f"{target}({name}=)": ((name,), lambda v, use=use, name=name: use(**{name: v}))
        for target, (use, names) in table.items()
        for name in names
    }


# ---- Networks and callables ----


class Misbehaving(nn.Module):
    """Returns something else than it should, when it should not."""

    def __init__(self, fault, when, where):
        super().__init__()
        self.first, self.second = nn.Linear(16, 6), nn.Linear(6, 3)
        self.bad = Bad(fault, when)
        self.where = where

    def forward(self, x):
        hidden = self.first(x).tanh()
        if self.where == "hidden":
            self.bad(hidden)
            return self.second(hidden)
        return self.bad(self.second(hidden))


class Bad(nn.Module):
    def __init__(self, fault, when):
        super().__init__()
        self.fault, self.when, self.is_fitted = RETURNS[fault], when, False

    def forward(self, x):
        is_on = {
            "always": True,
            "after fit": self.is_fitted,
            "in large batches": len(x) > 8,
        }[self.when]
        return self.fault(x * 1, x) if is_on else x * 1


# Where the network comes from, in messages.
NETWORK = ("X", "feature_extractor", "module", "network", "layers", "method", "start_layer", "gate")


def with_network(name):
    """Fit and predict, and let the network misbehave in between if it is to."""

    def use(network):
        layer = "bad"
        estimator = {
            "extractor": lambda: TorchFeatureExtractor(network, layers=layer),
            "DkNN": lambda: DkNNClassifier(network, layers=layer, n_neighbors=5, random_state=0),
            "RAILS": lambda: RAILSClassifier(network, layers=layer, **SMALL),
            "RAILS of the output": lambda: RAILSClassifier(network, layers=None, **SMALL),
            "RAILS of the input": lambda: RAILSClassifier(
                network, layers="input", gate=Arbitration(0.3), **SMALL
            ),
            "RAILS behind it": lambda: RAILSClassifier(
                network, layers="second", start_layer="first", **SMALL
            ),
            "scorer": lambda: ThreatScorer(network, layers=layer, **SCORER),
            "scorer of all methods": lambda: ThreatScorer(
                network, layers=layer, method=METHODS_OF_SCORER, **SCORER
            ),
        }[name]()
        estimator.fit(X, Y)
        network.bad.is_fitted = True
        kind = name.split()[0]
        for method in METHODS[kind][:2]:
            sound(method, estimator, getattr(estimator, method)(X), len(X))

    return use


def network_cases():
    names = ["extractor", "DkNN", "RAILS", "RAILS of the output", "RAILS of the input"]
    names += ["RAILS behind it", "scorer", "scorer of all methods"]
    for name, fault, when, where in itertools.product(
        names, RETURNS, ("always", "after fit", "in large batches"), ("hidden", "output")
    ):
        yield Case(
            f"{name} with a {where} layer {when}",
            fault,
            with_network(name),
            NETWORK,
            lambda fault=fault, when=when, where=where: seeded(
                lambda: Misbehaving(fault, when, where)
            ),
        )
    functions = {
        "pgd": lambda network: finite(pgd(network, X, Y, **PGD)),
        "choose_layers": lambda network: choose_layers(network, LARGE, LARGE_Y, random_state=0),
        "DkNN auto": lambda network: fits_and_predicts("DkNN", feature_extractor=network),
    }
    for (target, use), fault, where in itertools.product(
        functions.items(), RETURNS, ("hidden", "output")
    ):
        yield Case(
            f"{target} with a {where} layer",
            fault,
            use,
            NETWORK,
            lambda fault=fault, where=where: seeded(lambda: Misbehaving(fault, "always", where)),
        )


class Neighbors(BaseEstimator):
    """An index that answers something else."""

    def __init__(self, fault=None):
        self.fault = fault

    def fit(self, X, y=None):
        self.n_ = len(X)
        return self

    def kneighbors(self, X, n_neighbors, return_distance):
        return self.fault(np.tile(np.arange(n_neighbors), (len(X), 1)), X)


class Scorer(BaseEstimator):
    """An outlier detector that answers something else."""

    def __init__(self, scores=None, labels=None):
        self.scores, self.labels = scores, labels

    def fit(self, X, y=None):
        self.is_fitted_ = True
        return self

    def score_samples(self, X):
        result = -np.abs(np.asarray(X)).reshape(len(X), -1).sum(axis=1).astype(float)
        return result if self.scores is None else self.scores(result, np.array(X))

    def predict(self, X):
        result = np.ones(len(X), dtype=int)
        return result if self.labels is None else self.labels(result, np.array(X))


def callable_cases():
    def affine(a, b):
        return -(a - b).abs().sum(dim=1)

    def of_affinity(use):
        return lambda fault: use(lambda a, b: RETURNS[fault](affine(a, b), a, b))

    def index(affinity):
        found = ClassNeighbors(affinity).fit(torch.tensor(X), Y, 3)
        require(not found.kneighbors(torch.tensor(X[:3]), 2)[0].isnan().any(), "NaN")

    def robust(attack):
        share(make_robust_scorer(attack)(fitted("DkNN of vectors"), X, Y))

    def draws_layers(attack):
        closed(LayerDisplay.from_estimator(fitted("DkNN of vectors"), X, Y, attack, layers="0"))

    def triage(**parameters):
        fits_and_predicts("RAILS of vectors", gate=Triage(), threat_scorer=Scorer(**parameters))

    def responds(**parameters):
        rails = clone(ESTIMATORS["RAILS"]).set_params(threat_scorer=Scorer(**parameters)).fit(X, Y)
        sound("respond", rails, rails.respond(X), len(X))
        sound("predict_with_alarm", rails, rails.predict_with_alarm(X), len(X))

    def draws_threat(scores):
        closed(ThreatDisplay.from_estimator(Scorer(scores).fit(X), X, X))

    def recomputes(recompute):
        algorithm = ExactNeighbors("float16")
        features = torch.tensor(X)
        found = ClassNeighbors(algorithm=algorithm).fit(features, Y, 3)
        affinity, _ = found.kneighbors(features[:3], 2, lambda i: recompute(features[i], i))
        require(not affinity.isnan().any(), "NaN")

    table = {
        "RAILS(affinity=)": (
            ("affinity",),
            of_affinity(lambda f: fits_and_predicts("RAILS", affinity=f)),
        ),
        "RAILS of vectors(affinity=)": (
            ("affinity",),
            of_affinity(lambda f: fits_and_predicts("RAILS of vectors", affinity=f)),
        ),
        "ClassNeighbors(affinity=)": (("affinity",), of_affinity(index)),
        "RAILS(algorithm=)": (
            ("algorithm",),
            lambda fault: fits_and_predicts("RAILS", algorithm=Neighbors(RETURNS[fault])),
        ),
        "DkNN(algorithm=)": (
            ("algorithm",),
            lambda fault: fits_and_predicts("DkNN", algorithm=Neighbors(RETURNS[fault])),
        ),
        "RAILS(threat_scorer=) scores": (
            ("threat_scorer",),
            lambda fault: responds(scores=RETURNS[fault]),
        ),
        "RAILS(threat_scorer=) labels": (
            ("threat_scorer",),
            lambda fault: responds(labels=RETURNS[fault]),
        ),
        "RAILS(gate=Triage())": (
            ("threat_scorer",),
            lambda fault: triage(labels=RETURNS[fault]),
        ),
        "ThreatScorer(method=)": (
            ("method",),
            lambda fault: fits_and_predicts("scorer", method=Scorer(RETURNS[fault])),
        ),
        "ThreatScorer(method=) of vectors": (
            ("method",),
            lambda fault: fits_and_predicts(
                "scorer of vectors", method=["distance", Scorer(RETURNS[fault])]
            ),
        ),
        "make_robust_scorer(attack=)": (
            ("attack",),
            lambda fault: robust(lambda network, X, y: RETURNS[fault](X, y)),
        ),
        "LayerDisplay(attack=)": (
            ("attack",),
            lambda fault: draws_layers(lambda X, y: RETURNS[fault](np.array(X), y)),
        ),
        "ThreatDisplay(estimator=)": (
            ("estimator", "threat"),
            lambda fault: draws_threat(RETURNS[fault]),
        ),
        "ClassNeighbors.kneighbors(recompute=)": (
            ("recompute", "affinity"),
            lambda fault: recomputes(RETURNS[fault]),
        ),
    }
    for (target, (names, use)), fault in itertools.product(table.items(), RETURNS):
        yield Case(target, fault, lambda _, use=use, fault=fault: use(fault), names)


def network_and_callable_cases():
    yield from network_cases()
    yield from callable_cases()


KINDS = {
    "data cases": data_cases,
    "parameter cases": parameter_cases,
    "network and callable cases": network_and_callable_cases,
}


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A folder for the files that ``save`` writes, and a memory that huge sizes do not fill."""
    monkeypatch.chdir(tmp_path)
    with limited_memory(6 * 2**30):
        yield
    if client.cache_info().currsize:
        client().close()
        client.cache_clear()


def check(cases):
    """Try cases, and return how many; the error lists their faults by kind."""
    tried = [(case, fault_of(case)) for case in cases]
    faults = [(case, fault) for case, fault in tried if fault is not None]
    assert not faults, f"{len(faults)} of {len(tried)} cases:\n{group(faults)}"
    return len(tried)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("somewhere")
def test_nothing_breaks_it(kind, report):
    report(f"fuzz: {kind}", check(KINDS[kind]()))


@pytest.mark.usefixtures("somewhere")
def test_one_case_of_each_target():
    """A sample of the above: one strange thing for each method and parameter."""
    rng = np.random.default_rng(1)
    by_target = collections.defaultdict(list)
    for case in itertools.chain.from_iterable(cases() for cases in KINDS.values()):
        by_target[case.target].append(case)
    assert check(cases[rng.integers(len(cases))] for cases in by_target.values()) > 300
