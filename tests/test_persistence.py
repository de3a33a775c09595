"""Files that run no code: what comes back, and what is refused."""

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import NearestNeighbors
from torch import nn

from sklearn_rails import (
    DkNNClassifier,
    FrozenModule,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
    _archive,
)
from sklearn_rails._encoding import Decoder, Encoder
from sklearn_rails.immune import Arbitration, Triage, compiled
from sklearn_rails.neighbors import ExactNeighbors
from sklearn_rails.persistence import load, save
from sklearn_rails.sensing import DETECTORS


def make_network(activation=nn.Tanh, width=5):
    return nn.Sequential(nn.Linear(6, width), activation(), nn.Linear(width, 3))


torch.manual_seed(0)
NET = make_network()
OTHER = nn.Linear(6, 3)
rng = np.random.default_rng(0)
X = rng.random((90, 6), dtype=np.float32)
Y = np.array(["a", "b", "c"])[np.arange(90) % 3]
NEW = rng.random((15, 6), dtype=np.float32)
RAILS = RAILSClassifier(NET, layers="1", population_size=30, random_state=0)
EVERY = ThreatScorer(method=list(DETECTORS), alpha=0.2)
ESTIMATORS = {
    "RAILS": RAILS,
    "RAILS, alarms, gate": clone(RAILS).set_params(threat_scorer=EVERY, gate=Arbitration()),
    "RAILS, hidden cells": clone(RAILS).set_params(
        start_layer="0",
        affinity="cosine",
        algorithm=ExactNeighbors("float16"),
        threat_scorer=ThreatScorer(alpha=0.2),
        gate=Triage(),
        random_state=np.random.RandomState(3),
    ),
    "RAILS, auto": RAILSClassifier(FrozenModule(NET), population_size=30, random_state=0),
    "RAILS, bfloat16": clone(RAILS).set_params(dtype="bfloat16"),
    "RAILS, trees": RAILSClassifier(population_size=30, algorithm="kd_tree", random_state=0),
    "RAILS, two networks": clone(RAILS).set_params(
        threat_scorer=ThreatScorer(OTHER, layers="output", alpha=0.2)
    ),
    "DkNN": DkNNClassifier(NET, layers=["0", "output"], random_state=0),
    "DkNN, no network": DkNNClassifier(random_state=0),
    "ThreatScorer": ThreatScorer(NET, layers="1", random_state=0),
    "ThreatScorer, layers of each method": ThreatScorer(
        NET,
        layers={"mahalanobis": "1", "lid": ["0", "1"]},
        method=["mahalanobis", "lid"],
        random_state=0,
    ),
    "TorchFeatureExtractor": TorchFeatureExtractor(NET, layers="1"),
}
ASK = ("predict_proba", "decision_function", "transform", "score_samples", "kneighbors", "p_values")


def networks_of(name):
    if "no network" in name or "trees" in name:
        return None
    return [make_network(), nn.Linear(6, 3)] if "two" in name else make_network()


def assert_same_answers(found, expected):
    for method in ASK:
        if hasattr(expected, method):
            for a, b in zip(
                *(_flat(getattr(e, method)(NEW)) for e in (found, expected)), strict=True
            ):
                assert_array_equal(a, b)


def _flat(answer):
    if isinstance(answer, tuple):
        return [part for item in answer for part in _flat(item)]
    return list(answer.values()) if isinstance(answer, dict) else [answer]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("mmap_mode", [None, "r"])
def test_a_fitted_estimator_comes_back(name, mmap_mode, tmp_path):
    estimator = clone(ESTIMATORS[name]).fit(X, Y)
    if hasattr(estimator, "remember"):
        estimator.remember(estimator.respond(NEW))
    path = tmp_path / "model.rails"
    save(estimator, path)
    loaded = load(path, networks_of(name), mmap_mode=mmap_mode)
    assert type(loaded) is type(estimator)
    assert_same_answers(loaded, estimator)
    for key, value in estimator.get_params().items():
        if isinstance(value, str | int | float | list):
            assert loaded.get_params()[key] == value
    # Again, and in the other kind of file.
    save(loaded, path)
    assert_same_answers(load(path, networks_of(name)), estimator)
    assert_same_answers(pickle.loads(pickle.dumps(loaded)), estimator)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_that_is_not_fitted_comes_back(name, tmp_path):
    save(ESTIMATORS[name], tmp_path / "model")
    loaded = load(tmp_path / "model", networks_of(name))
    assert not hasattr(loaded, "n_features_in_")
    assert_same_answers(loaded.fit(X, Y), clone(ESTIMATORS[name]).fit(X, Y))


@pytest.mark.parametrize(
    "labels",
    [np.arange(90) % 3 - 1, (np.arange(90) % 3).astype(object), np.array(Y, dtype=object)],
    ids=["int", "object", "string"],
)
def test_labels_of_all_kinds_come_back(labels, tmp_path):
    estimator = DkNNClassifier(random_state=0).fit(X, labels.tolist())
    save(estimator, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.classes_.dtype == estimator.classes_.dtype
    assert loaded.predict(NEW).tolist() == estimator.predict(NEW).tolist()


def test_a_loaded_classifier_goes_on_learning(tmp_path):
    rails = clone(RAILS).fit(X, Y)
    save(rails, tmp_path / "model")
    for mmap_mode in (None, "r"):
        loaded = load(tmp_path / "model", make_network(), mmap_mode=mmap_mode)
        assert_same_answers(
            loaded.partial_fit(NEW, Y[:15]),
            pickle.loads(pickle.dumps(rails)).partial_fit(NEW, Y[:15]),
        )
        loaded.remember(loaded.respond(NEW)).forget()


def test_the_network_that_is_given_stays_as_it_is(tmp_path):
    save(clone(RAILS).fit(X, Y), tmp_path / "model")
    given = make_network()
    before = [p.clone() for p in given.parameters()]
    loaded = load(tmp_path / "model", given)
    assert loaded.feature_extractor is not given
    for now, then in zip(given.parameters(), before, strict=True):
        assert torch.equal(now, then)
    for mine, theirs in zip(loaded.feature_extractor.parameters(), NET.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class Renamed(nn.Sequential):
    """The same layers in a class of another name."""


@pytest.mark.parametrize(
    ("module", "error", "match"),
    [
        (None, ValueError, r"weights of 1 network\(s\), \[Sequential \(feature_extractor\)\], and"),
        ([NET, NET], ValueError, "module gives 2"),
        ("net", TypeError, "module must be a torch.nn.Module, a fitted skorch net or .*, got str"),
        (make_network(width=4), ValueError, r"0.weight is \(4, 6\), in the file \(5, 6\)"),
        (nn.Linear(6, 3), ValueError, "0.weight is missing, in the file"),
        (make_network(nn.ReLU), ValueError, "Sequential of other settings .* other features"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(module, error, match, tmp_path):
    save(clone(RAILS).fit(X, Y), tmp_path / "model")
    with pytest.raises(error, match=match):
        load(tmp_path / "model", module)


def test_another_name_of_the_class_does_not_matter(tmp_path):
    rails = clone(RAILS).fit(X, Y)
    save(rails, tmp_path / "model")
    loaded = load(tmp_path / "model", Renamed(*make_network()))
    assert_same_answers(loaded, rails)


def test_a_network_for_an_estimator_without_one_is_refused(tmp_path):
    save(DkNNClassifier().fit(X, Y), tmp_path / "model")
    with pytest.raises(ValueError, match=r"weights of 0 network\(s\), \[\], and module gives 1"):
        load(tmp_path / "model", NET)
    with pytest.raises(ValueError, match="mmap_mode='w' must be None or 'r'"):
        load(tmp_path / "model", mmap_mode="w")


@pytest.mark.parametrize(
    ("estimator", "match"),
    [
        (IsolationForest(), "estimator must be one of RAILSClassifier, .*, got IsolationForest"),
        (RAILSClassifier(affinity=torch.dist), "RAILSClassifier.affinity is <built-in"),
        (DkNNClassifier(algorithm=NearestNeighbors()), "algorithm is NearestNeighbors"),
        (ThreatScorer(method=[IsolationForest()]), "method is IsolationForest"),
    ],
)
def test_what_would_need_code_is_refused(estimator, match, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    with pytest.raises(TypeError, match=match):
        save(estimator, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("place", ["write_array", "write_manifest"])
def test_a_full_disk_leaves_the_old_file(place, tmp_path, monkeypatch):
    path = tmp_path / "model"
    save(DkNNClassifier(random_state=0).fit(X, Y), path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"sklearn_rails.persistence.{place}", fail)
    with pytest.raises(OSError, match="No space left"):
        save(DkNNClassifier(random_state=1).fit(X, Y), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    save(clone(ESTIMATORS["RAILS, alarms, gate"]).fit(X, Y), path)
    return path


def rewrite(saved, path, change):
    """Write the file again with another manifest, and a checksum that agrees with it."""
    with zipfile.ZipFile(saved) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members.pop("manifest.json"))
    change(manifest, members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        _archive.write_manifest(archive, manifest)


def test_the_file_is_as_the_documentation_says(saved):
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
        manifest = json.loads(archive.read("manifest.json"))
        assert manifest["class"] == "RAILSClassifier"
        assert manifest["parameters"]["population_size"] == "30"
        assert set(manifest["versions"]) == {"sklearn_rails", "torch", "numpy"}
        for name in archive.namelist():
            if name.endswith(".npy"):
                with archive.open(name) as file:
                    np.load(file, allow_pickle=False)
        content = saved.read_bytes()
        for info in archive.infolist():
            if info.filename.endswith(".npy"):
                header = content[info.header_offset : info.header_offset + 30]
                begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
                assert begin % 64 == 0


def unknown_class(manifest, members):
    manifest["objects"][-1]["class"] = "Popen"


def other_root(manifest, members):
    manifest["root"] = {"array": 0}


def newer_format(manifest, members):
    manifest["format"] = 2


def no_objects(manifest, members):
    del manifest["objects"]


def deep_values(manifest, members):
    value = []
    for _ in range(200):
        value = [value]
    manifest["objects"][0]["state"]["seed_"] = value


def escaping_name(manifest, members):
    members["../../evil"] = b"x"


def array_of_objects(manifest, members):
    manifest["arrays"][0]["dtype"] = "|O"


def other_shape(manifest, members):
    manifest["arrays"][0]["shape"] = [10**12]


def other_content(manifest, members):
    name = manifest["arrays"][-1]["name"]
    members[name] = members[name][:-1] + bytes([members[name][-1] ^ 1])


def missing_array(manifest, members):
    members.pop(manifest["arrays"][-1]["name"])


def longer_array(manifest, members):
    members[manifest["arrays"][-1]["name"]] += b"x"


def no_such_array(manifest, members):
    manifest["objects"][0]["state"]["seed_"] = {"array": 10**6}


def negative_array(manifest, members):
    manifest["objects"][0]["state"]["seed_"] = {"array": -1}


def no_dtype(manifest, members):
    manifest["objects"][0]["state"]["seed_"] = {"dtype": "load"}


def two_kinds(manifest, members):
    manifest["objects"][0]["state"]["seed_"] = {"array": 0, "object": 0}


def no_state(manifest, members):
    (index,) = (o for o in manifest["objects"] if o["class"] == "ClassOrder")
    index["state"].pop("sizes")


def other_weights(manifest, members):
    name = manifest["networks"][0]["name"]
    members[name] = members[name][:-1] + bytes([members[name][-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (unknown_class, "KeyError: 'Popen'"),
        (other_root, "it holds a ndarray"),
        (newer_format, "is of format 2, written with .* reads format 1"),
        (no_objects, "the manifest has no objects"),
        (deep_values, "nested too deeply"),
        (escaping_name, "'../../evil'.*is missing, or another in manifest.json"),
        (array_of_objects, "arrays of object are not saved"),
        (other_shape, "not what manifest.json says"),
        (other_content, "does not agree with its checksum"),
        (missing_array, "is missing, or another in manifest.json"),
        (longer_array, "is missing, or another in manifest.json"),
        (no_such_array, "IndexError"),
        (negative_array, "-1 is no index"),
        (no_dtype, "'load' is no dtype"),
        (two_kinds, "unknown kind of value"),
        (no_state, "is damaged, or was not written by save"),
        (other_weights, "networks/0.safetensors does not agree with its checksum"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_with_another_content_is_refused(saved, change, match, tmp_path):
    path = tmp_path / "changed"
    rewrite(saved, path, change)
    with pytest.raises(ValueError, match=match) as caught:
        load(path, make_network())
    assert str(path) in str(caught.value)


def test_a_rewritten_file_without_a_change_is_loaded(saved, tmp_path):
    rewrite(saved, tmp_path / "same", lambda manifest, members: None)
    for mmap_mode in (None, "r"):  # its arrays are not aligned
        loaded = load(tmp_path / "same", make_network(), mmap_mode=mmap_mode)
        assert_same_answers(loaded, load(saved, make_network()))


def test_files_of_other_kinds_are_refused(saved, tmp_path):
    path = tmp_path / "file"
    whole = saved.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], pickle.dumps({})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or was not written by save"):
            load(path, make_network())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", "0" * 10**6)
    with pytest.raises(ValueError, match="'manifest.json' is compressed"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "[" * 10**5)
    with pytest.raises(ValueError, match="does not agree with its checksum"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("seed", range(200))
def test_a_flipped_bit_is_refused_or_changes_nothing(saved, seed, tmp_path):
    content = bytearray(saved.read_bytes())
    rng = np.random.default_rng(seed)
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    (tmp_path / "file").write_bytes(content)
    try:
        loaded = load(tmp_path / "file", make_network())
    except ValueError:
        return
    assert_same_answers(loaded, load(saved, make_network()))


def test_a_file_starts_no_compiler(saved, tmp_path, monkeypatch):
    def change(manifest, members):
        (schedule,) = (o["state"] for o in manifest["objects"] if o["class"] == "Schedule")
        schedule["compile"] = True

    rewrite(saved, tmp_path / "compiled", change)
    monkeypatch.setattr(compiled, "_compiled", lambda: pytest.fail("a compiler was started"))
    loaded = load(tmp_path / "compiled", make_network())
    assert loaded.engine_.layers[0].schedule.compile


def test_another_version_of_the_package_warns(saved, tmp_path):
    def change(manifest, members):
        manifest["objects"][0]["state"]["_sklearn_rails_version"] = "0.0.1"

    rewrite(saved, tmp_path / "older", change)
    with pytest.warns(UserWarning, match=r"by sklearn_rails 0\.0\.1 and is loaded"):
        load(tmp_path / "older", make_network())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_arrays_are_not_copied(tmp_path):
    X = np.random.default_rng(0).random((2000, 200), dtype=np.float32)
    save(DkNNClassifier(random_state=0).fit(X, np.arange(2000) % 3), tmp_path / "model")
    loaded = load(tmp_path / "model", mmap_mode="r")
    store = loaded._neighbors["input"].store
    address = store.examples.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    held = [m[0].split("-") for m in maps if m[-1] == str(tmp_path / "model")]
    assert any(int(low, 16) <= address < int(high, 16) for low, high in held)


def test_it_loads_in_another_process(saved):
    code = f"""
import numpy as np
from sklearn_rails.persistence import load
from torch import nn
net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
rails = load({str(saved)!r}, net)
print("".join(rails.predict(np.full((3, 6), 0.25, dtype=np.float32))))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    expected = load(saved, make_network()).predict(np.full((3, 6), 0.25, dtype=np.float32))
    assert run.stdout.strip() == "".join(expected)


@pytest.mark.parametrize(
    "value",
    [
        None,
        -3,
        2.5,
        np.inf,
        -np.inf,
        "text",
        [1, [2, "three"]],
        (1, (2,)),
        {3, 1, 2},
        slice(1, None, 2),
        torch.Size([2, 3]),
        {1: "one", ("a", 2): [None]},
        np.float64(0.1),
        np.float32("nan"),
        np.str_("x"),
        torch.float16,
        torch.device("cuda:1"),
        np.array([["a", None], [1, 2.5]], dtype=object),
        np.zeros((0, 3)),
        np.arange(6).reshape(2, 3).T,
    ],
    ids=repr,
)
def test_values_of_all_kinds_come_back(value):
    encoder = Encoder({})
    said = json.loads(json.dumps(encoder.encode(value, "value"), allow_nan=False))
    found = Decoder(encoder.objects, encoder.arrays.__getitem__, []).decode(said)
    assert type(found) is type(value)
    if isinstance(value, np.ndarray):
        assert found.dtype == value.dtype
        assert_array_equal(found, value)
    else:
        assert repr(found) == repr(value)


def test_what_is_one_object_stays_one():
    tensor, array, network = torch.arange(3), np.arange(3), nn.Linear(1, 1)
    encoder = Encoder({id(network): "net"})
    said = encoder.encode([tensor, tensor, array, array, network, FrozenModule(network)], "value")
    assert len(encoder.arrays) == 2
    assert encoder.networks == [(network, "net")]
    first, second, third, fourth, module, frozen = Decoder(
        [], encoder.arrays.__getitem__, [network]
    ).decode(said)
    assert first is second
    assert third is fourth
    assert module is frozen.module is network


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"tuple": 5}, TypeError),
        ({"float": "1e999"}, KeyError),
        ({"dtype": "float99"}, TypeError),
        ({"scalar": "|O", "value": 1}, TypeError),
        ({"dict": [[[1], 2]]}, TypeError),
        ({"object": 7}, IndexError),
        ({"network": True}, TypeError),
    ],
)
def test_values_that_no_encoder_makes_are_errors(said, error):
    with pytest.raises(error):
        Decoder([], [].__getitem__, []).decode(said)


def test_objects_and_dates_are_not_saved():
    for value in (np.array(["2020-01-01"], dtype="datetime64[D]"), object(), lambda: None):
        with pytest.raises(TypeError):
            Encoder({}).encode(value, "value")


def zip_of(path, members, comment=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
        manifest = dict(members).get("manifest.json", "")
        digest = hashlib.sha256(manifest.encode()).hexdigest()
        archive.comment = digest.encode() if comment is None else comment


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([("a", "b")], "it has no manifest.json"),
        ([("manifest.json", "{}"), ("manifest.json", "{}")], "is there twice"),
        ([("manifest.json", "{")], "manifest.json is not JSON"),
        ([("manifest.json", "[]")], "manifest.json is no object"),
        ([("manifest.json", "{}")], "the manifest has no format"),
        (
            [("manifest.json", '{"format": 1, "objects": [], "root": {}}')],
            "manifest.json lists no arrays",
        ),
        (
            [("manifest.json", '{"format": 1, "objects": [], "root": {}, "arrays": [3]}')],
            "does not describe its arrays",
        ),
    ],
)
def test_archives_of_others_are_refused(members, match, tmp_path):
    zip_of(tmp_path / "file", members)
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "file")


def test_weights_that_are_no_tensors_are_refused(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

    with pytest.raises(TypeError, match="Extra has a state that is no tensor, '_extra_state'"):
        save(TorchFeatureExtractor(Extra(2, 2)), tmp_path / "model")
