import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context

from sklearn_rails import DkNNClassifier, RAILSClassifier, TorchFeatureExtractor
from sklearn_rails._blocks import block_slices
from sklearn_rails.features.batching import (
    BatchLayout,
    iterate_batches,
    iterate_tiles,
    tile_shape,
)
from sklearn_rails.features.layouts import fastest_layout
from sklearn_rails.immune import layer


@settings(deadline=None)
@given(n=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_batches_have_one_shape_and_hold_every_row_once(n, batch_size):
    x = torch.arange(n * 2.0).reshape(n, 2)
    seen = []
    for rows, batch in iterate_batches(x, BatchLayout(batch_size)):
        assert batch.shape == (batch_size, 2)
        seen.append(batch[: rows.stop - rows.start])
        assert torch.equal(seen[-1], x[rows])
    assert torch.equal(torch.cat(seen), x)


@settings(deadline=None)
@given(
    n=st.integers(1, 12),
    n_cells=st.integers(1, 60),
    batch_size=st.integers(1, 80),
)
def test_tiles_have_one_shape_and_hold_every_cell_once(n, n_cells, batch_size):
    cells = torch.arange(1.0, n * n_cells + 1).reshape(n, n_cells, 1)
    seen = torch.zeros(n, n_cells, 1)
    for rows, columns, tile in iterate_tiles(cells, batch_size):
        assert tile.shape[:2] == tile_shape(n_cells, batch_size)
        seen[rows, columns] += tile[: rows.stop - rows.start, : columns.stop - columns.start]
    assert torch.equal(seen, cells)
    n_rows, n_columns = tile_shape(n_cells, batch_size)
    assert n_rows * n_columns <= max(1.5 * batch_size, n_cells if n_cells <= batch_size else 0)
    if n_cells > batch_size:  # next to nothing of a row's last tile is wasted
        assert -n_cells % n_columns < round(n_cells / batch_size)


def test_the_fastest_layout_is_found():
    def run(rows, layout):  # a fixed cost each batch, so that the largest wins
        for _ in range(-(-len(rows) // layout.batch_size)):
            torch.linalg.svdvals(torch.ones(40, 40))

    layout = fastest_layout(run, (3,), device=torch.device("cpu"), dtype=torch.float32)
    assert layout == BatchLayout(4096)


def test_layouts_for_which_there_is_no_memory_or_no_time_are_left_out():
    def run(rows, layout):
        if layout.batch_size > 256:
            raise torch.OutOfMemoryError("out of memory")

    settings = {"device": torch.device("cpu"), "dtype": torch.float32}
    assert fastest_layout(run, (3,), **settings) == BatchLayout(256)
    assert fastest_layout(lambda *_: time.sleep(0.06), (3,), **settings) == BatchLayout(256)

    def fail(rows, layout):
        raise torch.OutOfMemoryError("out of memory")

    assert fastest_layout(fail, (3,), **settings) == BatchLayout(1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (64,)])
@pytest.mark.parametrize("estimator", [RAILSClassifier, DkNNClassifier])
def test_a_slow_network_is_not_measured(digits, shape, estimator):
    def run(rows, layout):
        raise AssertionError("no time for a trial")

    settings = {"device": torch.device("cpu"), "dtype": torch.float32}
    slow = {"max_seconds": 1.0, "seconds_per_sample": 0.05}
    assert fastest_layout(run, (1, 8, 8), **settings, **slow) == BatchLayout(16)
    assert fastest_layout(run, (64,), **settings, **slow, is_cheap=False) == BatchLayout(16)

    class Slow(torch.nn.Module):
        n_rows = 0

        def forward(self, x):
            Slow.n_rows += len(x)
            time.sleep(0.01 * len(x))
            return x.flatten(1)

    X, y = digits
    estimator(Slow(), layers="output", input_shape=shape, n_neighbors=3).fit(X[:20], y[:20])
    assert Slow.n_rows <= 5 * 20


def test_blocks_of_features_fit_into_working_memory(digits):
    X, y = digits
    rails = RAILSClassifier(torch.nn.Linear(64, 1000), random_state=0).fit(X[:200], y[:200])
    expected = rails.kneighbors(X[200:300])
    with config_context(working_memory=0.1):
        blocks = block_slices(100, rails._features.row_bytes, rails._features.device)
        found = rails.kneighbors(X[200:300])
    assert max(block.stop - block.start for block in blocks) * 4000 <= 0.1 * 2**20
    assert [range(100)[block] for block in blocks][-1].stop == 100
    for a, b in zip(found, expected, strict=True):
        assert (a["output"] == b["output"]).all()


def test_images_of_one_channel_are_stored_with_channels_last():
    batch = torch.rand(3, 1, 4, 5)
    stored = BatchLayout(3, channels_last=True).store(batch)
    assert torch.equal(stored, batch)
    assert stored.stride() == (20, 1, 5, 1)


class Hungry(torch.nn.Module):
    """Runs out of memory for more than ``limit`` rows."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def forward(self, x):
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return 2 * x


def test_batches_are_halved_until_they_fit(digits):
    X, y = digits
    extractor = TorchFeatureExtractor(Hungry(5), batch_size=64)
    assert torch.equal(extractor.fit_transform(torch.tensor(X[:70])), torch.tensor(2 * X[:70]))
    params = {"population_size": 30, "generations": 1, "batch_size": 64, "random_state": 0}
    rails = RAILSClassifier(Hungry(5), **params).fit(X[:200], y[:200])
    roomy = RAILSClassifier(Hungry(1000), **params).fit(X[:200], y[:200])
    assert (rails.predict(X[200:240]) == roomy.predict(X[200:240])).all()
    assert {layout.batch_size for layout in rails._features._layouts.of_cells.values()} == {4}


def test_what_does_not_fit_at_all_is_explained(digits):
    X, _ = digits
    with pytest.raises(MemoryError, match=r"single sample.*device='cpu'"):
        TorchFeatureExtractor(Hungry(0), batch_size=64).fit_transform(X[:70])


def test_blocks_of_rows_are_halved_until_they_fit(digits, monkeypatch):
    X, y = digits
    rails = RAILSClassifier(population_size=30, early_stopping=False, random_state=0)
    expected = rails.fit(X[:200], y[:200]).predict_proba(X[200:230])
    plain, sizes = layer.mature, []

    def hungry(cells, *args, **kwargs):
        sizes.append(len(cells))
        if len(cells) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return plain(cells, *args, **kwargs)

    monkeypatch.setattr(layer, "mature", hungry)
    limit = 8
    assert (rails.predict_proba(X[200:230]) == expected).all()
    assert max(sizes) == 30
    limit = 0
    with pytest.raises(MemoryError, match="population_size"):
        rails.predict(X[200:203])
