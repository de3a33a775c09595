"""Every estimator on every network of the zoo, beside a plain forward pass."""

import os
import pickle
import random
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from networks import REFUSED, TOKENS, ZOO, unpicklable
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone

from sklearn_rails import (
    DkNNClassifier,
    FrozenModule,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
)
from sklearn_rails.attacks import AdaptiveKNNAttack
from sklearn_rails.features.contents import plain_module
from sklearn_rails.features.outputs import find_tensor

N_SAMPLES = 36

in_zoo = pytest.mark.parametrize("name", ZOO)


def make(specimen):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = specimen.make()
        network.train()
    rng = np.random.default_rng(0)
    if specimen.shape == TOKENS:
        X = rng.integers(0, 50, size=(N_SAMPLES, *specimen.shape))
    else:
        X = rng.random((N_SAMPLES, *specimen.shape), dtype=np.float32)
    return network, X, np.arange(N_SAMPLES) % 3


def settings(specimen, **others):
    return {"layers": specimen.layers, "batch_size": specimen.batch_size} | others


@in_zoo
@pytest.mark.filterwarnings("ignore:layers='auto'", "ignore:No attack", "ignore:The .grad")
def test_a_layer_is_chosen_on_any_network(name):
    specimen = ZOO[name]
    network, X, y = make(specimen)
    X, y = np.concatenate([X, X]), np.concatenate([y, y])
    shared = {"n_neighbors": 3, "batch_size": specimen.batch_size, "random_state": 0}
    dknn = DkNNClassifier(network, **shared).fit(X, y)
    named = DkNNClassifier(network, layers=dknn.layers_, **shared).fit(X, y)
    assert len(dknn.layers_) == 1
    assert_array_equal(named.predict(X), dknn.predict(X))


def estimators(network, specimen):
    has_floats = specimen.shape != TOKENS
    shared = settings(specimen, random_state=0)
    methods = ["distance", "credibility"] + ["mahalanobis"] * has_floats
    return [
        RAILSClassifier(
            network,
            start_layer=specimen.start_layer,
            population_size=20,
            generations=2,
            n_neighbors=3,
            early_stopping=False,
            **shared,
        ),
        DkNNClassifier(network, n_neighbors=3, **shared),
        ThreatScorer(network, method=methods, n_neighbors=3, alpha=0.2, **shared),
    ]


def plain_forward(specimen, X):
    """Compute the layers by a forward pass with hooks that clone, in batches of equal size."""
    network = plain_module(make(specimen)[0])
    network.eval()
    kept = {}

    def keep(name, output):
        kept.setdefault(name, []).append(find_tensor(output).clone())

    for name, layer in network.named_modules():
        if name in specimen.layers:
            layer.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    size = len(X) if specimen.batch_size == "auto" else max(4, specimen.batch_size)
    with torch.no_grad(), torch.random.fork_rng():
        for start in range(0, len(X), size):
            x = torch.from_numpy(X[start : start + size].copy())
            n = len(x)
            x = torch.cat([x, x[:1].expand(size - n, *x.shape[1:])])
            if x.is_floating_point():
                x = x.to(dtype)
            kept.setdefault("input", []).append(x.clone())
            keep("output", network(x))
    columns = []
    for name in specimen.layers:
        values = torch.cat([v.dequantize() if v.is_quantized else v for v in kept[name]])
        columns.append(values[: len(X)].float().reshape(len(X), -1))
    return torch.cat(columns, dim=1).numpy()


def snapshot(network):
    """Record what must not change in a network."""
    tensors = [*network.parameters(), *network.buffers()]
    return {
        "values": [t.detach().clone() for t in tensors],
        "identities": [id(t) for t in tensors],
        "gradients": [t.grad for t in tensors],
        "requires_grad": [t.requires_grad for t in tensors],
        "training": [m.training for m in network.modules()],
        "hooks": [
            (list(m._forward_hooks), list(m._forward_pre_hooks))
            for m in network.modules()
            if not isinstance(m, torch.jit.ScriptModule)
        ],
        "kept": [repr(getattr(network, name, None)) for name in ("kept", "skip", "out", "memo")],
    }


def assert_unchanged(network, before):
    after = snapshot(network)
    for old, new in zip(before.pop("values"), after.pop("values"), strict=True):
        if not old.is_quantized:
            assert_array_equal(*(t.to_dense().float() for t in (old, new)))
    assert before == after


@in_zoo
def test_features_are_those_of_a_plain_forward_pass(name):
    specimen = ZOO[name]
    network, X, _ = make(specimen)
    expected = plain_forward(specimen, X)
    extractor = TorchFeatureExtractor(network, **settings(specimen)).fit(X)
    found = extractor.transform(X)
    assert found.dtype == np.float32
    tolerance = specimen.tolerance * np.abs(expected).max()
    assert_allclose(found, expected, rtol=0, atol=tolerance)
    # A sample alone has the features that it has in company.
    alone = np.concatenate([extractor.transform(X[i : i + 1]) for i in range(0, len(X), 5)])
    assert_allclose(alone, found[::5], rtol=0, atol=1e-6 * np.abs(expected).max())
    start = 0
    for layer in specimen.layers:
        single = clone(extractor).set_params(layers=layer).fit_transform(X)
        end = start + single.shape[1]
        assert_allclose(found[:, start:end], single, rtol=0, atol=1e-6 * np.abs(single).max())
        start = end
    assert start == found.shape[1]


@in_zoo
def test_network_and_data_of_the_user_are_unchanged(name):
    specimen = ZOO[name]
    network, X, y = make(specimen)
    before, original = snapshot(network), X.copy()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    drawn = torch.rand(2), np.random.rand(2), random.random()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    TorchFeatureExtractor(network, **settings(specimen)).fit_transform(X)
    for estimator in estimators(network, specimen):
        estimator.fit(X, y).predict(X)
    assert torch.equal(drawn[0], torch.rand(2))
    assert_array_equal(drawn[1], np.random.rand(2))
    assert drawn[2] == random.random()
    assert_array_equal(X, original)
    assert_unchanged(network, before)


@in_zoo
def test_predictions_are_the_same_alone_and_after_pickling(name):
    specimen = ZOO[name]
    network, X, y = make(specimen)
    for estimator in estimators(network, specimen):
        ask = "score_samples" if isinstance(estimator, ThreatScorer) else "predict_proba"
        estimator.fit(X, y)
        expected = getattr(estimator, ask)(X)
        assert np.isfinite(expected).all()
        alone = np.concatenate([getattr(estimator, ask)(X[i : i + 1]) for i in range(6)])
        assert_allclose(alone, expected[:6], rtol=1e-5, atol=1e-5)
        loaded = pickle.loads(pickle.dumps(estimator))
        assert_allclose(getattr(loaded, ask)(X), expected, rtol=1e-6, atol=1e-6)
        assert clone(estimator).feature_extractor is network


@in_zoo
def test_networks_hash_by_content(name):
    frozen = FrozenModule(make(ZOO[name])[0])
    key = joblib.hash(frozen)
    assert joblib.hash(frozen) == key
    loaded = pickle.loads(pickle.dumps(frozen))
    assert joblib.hash(loaded) == key
    weights = [p for p in frozen.module.parameters() if p.is_floating_point()]
    if weights:
        weights[-1].data.add_(1)
        assert joblib.hash(frozen) != key


WITHOUT_GRADIENTS = "quantised", "output in a tensor that is reused"
HAVE_GRADIENTS = [
    name for name in ZOO if ZOO[name].shape != TOKENS and name not in WITHOUT_GRADIENTS
]


@pytest.mark.parametrize("name", HAVE_GRADIENTS)
def test_the_adaptive_attack_runs_through_every_network(name):
    specimen = ZOO[name]
    network, X, y = make(specimen)
    before = snapshot(network)
    dknn = DkNNClassifier(network, n_neighbors=3, **settings(specimen, random_state=0)).fit(X, y)
    attack = AdaptiveKNNAttack(dknn, X, y, eps=0.2, max_iter=4, n_restarts=1, random_state=0)
    with torch.no_grad():
        attacked = attack.generate(X[:5], y[:5])
    assert np.isfinite(attacked).all()
    assert np.abs(attacked - X[:5]).max() <= 0.2 + 1e-6
    assert_unchanged(network, before)


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_networks_raise_in_fit(name):
    specimen = REFUSED[name]
    network, X, y = make(specimen)
    for estimator in estimators(network, specimen):
        if name == "cells made of token ids" and not isinstance(estimator, RAILSClassifier):
            continue
        with pytest.raises(ValueError, match=specimen.message):
            estimator.fit(X, y)
        assert not hasattr(estimator, "layers_")


def test_attributes_that_cannot_be_copied_are_shared_and_named_when_pickled():
    X, y = make(ZOO["identity"])[1:]
    for network in unpicklable():
        dknn = DkNNClassifier(network, n_neighbors=3, random_state=0).fit(X, y)
        dknn.predict(X)
        with pytest.raises(TypeError, match="network Forward cannot be pickled"):
            pickle.dumps(dknn)


@pytest.mark.parametrize("name", ["activation kept and used later", "observer in a buffer"])
def test_threads_do_not_share_state_of_a_pass(name):
    network, X, y = make(ZOO[name])
    X, y = np.tile(X, (8, 1)), np.tile(y, 8)
    settings = {"layers": "output", "population_size": 60, "random_state": 0, "batch_size": 16}
    expected = RAILSClassifier(network, **settings).fit(X, y).predict_proba(X)
    found = RAILSClassifier(network, n_jobs=4, **settings).fit(X, y).predict_proba(X)
    assert_array_equal(found, expected)


def test_an_autocast_of_the_caller_changes_nothing():
    network, X, y = make(ZOO["weight_norm"])
    for estimator in estimators(network, ZOO["weight_norm"]):
        ask = "score_samples" if isinstance(estimator, ThreatScorer) else "predict_proba"
        expected = getattr(estimator.fit(X, y), ask)(X)
        # Matrix products of arrays that lie elsewhere in memory may differ in the last bit.
        with torch.autocast("cpu", torch.bfloat16):
            assert_allclose(getattr(estimator, ask)(X), expected, rtol=1e-6)
            assert_allclose(getattr(estimator.fit(X, y), ask)(X), expected, rtol=1e-6)


def test_samples_that_a_network_fails_on_raise():
    network, X, y = make(ZOO["token ids, mean of embeddings"])
    dknn = DkNNClassifier(network, layers="b", random_state=0).fit(X, y)
    with pytest.raises(ValueError, match="fails on some samples of X: IndexError: index out of"):
        dknn.predict(X + 100)


@pytest.mark.slow
def test_checksums_are_the_same_in_every_process():
    code = (
        "import torch, networks; from sklearn_rails.features.contents import checksum\n"
        "for specimen in networks.ZOO.values():\n"
        "    torch.manual_seed(0); print(checksum(specimen.make()))"
    )
    found = []
    for seed in "12":
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        found.append(run.stdout.splitlines())
    assert len(found[0]) == len(ZOO)
    assert found[0] == found[1]


def test_a_hook_that_watches_runs_once_and_one_that_acts_always():
    network, X, _ = make(ZOO["in-place activations"])
    expected = TorchFeatureExtractor(network, layers="fc").fit_transform(X)
    seen = []
    network[0].register_forward_hook(lambda m, i, o: seen.append(len(o)))
    network.register_forward_hook(lambda m, i, k, o: seen.append(len(o)), with_kwargs=True)
    extractor = TorchFeatureExtractor(network, layers="fc").fit(X)
    assert_array_equal(extractor.transform(X), expected)
    assert seen == [2, 2]
    assert [len(layer._forward_hooks) for layer in (network, network[0])] == [1, 1]
    network[0].register_forward_hook(lambda m, i, o: (o.mul_(-3), None)[1])
    changed = TorchFeatureExtractor(network, layers="fc").fit_transform(X)
    assert np.abs(changed - expected).max() > 0.01
    # The extractor of before follows.
    assert_array_equal(extractor.transform(X), changed)
    assert set(seen) == {2}
