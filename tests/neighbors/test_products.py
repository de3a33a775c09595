import pytest
import torch

from sklearn_rails.neighbors import ClassNeighbors, exact, products
from sklearn_rails.neighbors.exact import add_product, product_is_exact
from sklearn_rails.neighbors.products import split_is_faster


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("n_queries", [1, 3, 4, 5])
@pytest.mark.parametrize("n", [1, 2, 97, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_give_the_products(faster, n_queries, n, dtype, monkeypatch):
    monkeypatch.setattr(exact, "MIN_SPLIT_BYTES", 1)
    monkeypatch.setattr(exact, "split_is_faster", lambda *settings: faster)
    generator = torch.Generator().manual_seed(0)
    offsets, queries, examples = (
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in ((n,), (n_queries, 7), (n, 7))
    )
    found = add_product(offsets, queries, examples)
    torch.testing.assert_close(found, offsets + queries @ examples.T)


def test_neighbours_are_the_same_both_ways(monkeypatch):
    monkeypatch.setattr(exact, "MIN_SPLIT_BYTES", 1)
    generator = torch.Generator().manual_seed(0)
    X, Q = (torch.randn(n, 40, generator=generator) for n in (500, 3))
    found = []
    for faster in (False, True):
        monkeypatch.setattr(exact, "split_is_faster", lambda *settings, f=faster: f)
        neighbors = ClassNeighbors().fit(X, (torch.arange(500) % 3).numpy(), 3)
        found.append(neighbors.kneighbors(Q, 5))
    for whole, split in zip(*found, strict=True):
        torch.testing.assert_close(whole, split, rtol=0, atol=0)


def test_what_is_faster_is_measured_once(monkeypatch):
    monkeypatch.setattr(products, "TRIAL_BYTES", 4096)
    calls = []
    split = products.add_split_product
    monkeypatch.setattr(
        products, "add_split_product", lambda *args: calls.append(1) or split(*args)
    )
    split_is_faster.cache_clear()
    assert split_is_faster(8, torch.float32, 2) in (False, True)
    n_calls = len(calls)
    assert n_calls == products.N_TRIALS
    split_is_faster(8, torch.float32, 2)
    assert len(calls) == n_calls
    split_is_faster.cache_clear()


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "fp32_precision"),
    reason="these settings came with torch 2.9",
)
@pytest.mark.parametrize("owner", ["products", "library", "all"])
def test_products_are_exact_unless_a_setting_of_torch_rounds_them(owner):
    backends, rows = torch.backends, torch.zeros(1, 2)
    owners = {
        "products": backends.mkldnn.matmul,
        "library": backends.mkldnn,
        "all": backends,
    }
    assert product_is_exact(rows)
    try:
        for precision, is_exact in (("bf16", False), ("ieee", True)):
            owners[owner].fp32_precision = precision
            assert product_is_exact(rows) is is_exact
            assert product_is_exact(rows.double())
    finally:
        owners[owner].fp32_precision = "none"
    assert product_is_exact(rows)
