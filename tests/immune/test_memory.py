import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from sklearn_rails.immune.memory import MemoryBank

# Cells of one number, and their classes: few of each, so that some come again.
arrivals = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=30)


@settings(deadline=None)
@given(parts=st.lists(arrivals, max_size=4), capacity=st.integers(3, 12))
def test_each_class_keeps_its_newest_cells(parts, capacity):
    bank, order = MemoryBank(capacity, 3, (1,)), []
    for part in parts:
        cells = np.array([[c] for c, _ in part], dtype=np.float32).reshape(-1, 1)
        bank = bank.with_cells(cells, np.array([label for _, label in part], dtype=np.int64))
        for arrival in part:
            order = [a for a in order if a != arrival] + [arrival]
    held = list(zip(bank.cells[:, 0].astype(int), bank.labels, strict=True))
    for c in range(3):
        newest = [a for a in order if a[1] == c][-(capacity // 3) :]
        assert [a for a in held if a[1] == c] == newest
    assert len(bank) == len(held) <= capacity


def test_a_bank_never_changes():
    bank = MemoryBank(2, 2, (2,))
    more = bank.with_cells(np.ones((1, 2), dtype=np.float32), np.array([1]))
    more.with_cells(np.zeros((1, 2), dtype=np.float32), np.array([1]))
    assert len(bank) == 0
    assert_array_equal(more.cells, [[1, 1]])
    assert repr(more) == "MemoryBank(1 cells, capacity 2)"


def test_more_classes_have_smaller_shares():
    cells = np.arange(6, dtype=np.float32)[:, None]
    bank = MemoryBank(6, 2, (1,)).with_cells(cells, np.array([0, 0, 0, 1, 1, 1]))
    wider = bank.with_classes(3, np.array([0, 2]))
    assert_array_equal(wider.cells[:, 0], [1, 2, 4, 5])
    assert_array_equal(wider.labels, [0, 0, 2, 2])
