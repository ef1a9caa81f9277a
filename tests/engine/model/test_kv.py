"""Rows come back as they were written, wherever their pages lie."""

import mmap
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moestro.engine.facts import PAGE_TOKENS
from moestro.engine.model import KVStore, SequenceKV


def rows(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(seed))


def put(kv: SequenceKV, keys: torch.Tensor) -> None:
    for layer in (0, 1):
        kv.write(layer, keys + layer, -keys)
    kv.commit(keys.shape[1])


def held(kv: SequenceKV, layer: int) -> torch.Tensor:
    keys, values = kv.read(layer, 0)
    assert torch.allclose(values, layer - keys, atol=1e-6)
    return keys - layer


@given(
    order=st.permutations(list(range(6))),
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
)
def test_rows_of_scattered_pages(order: list[int], sizes: list[int]) -> None:
    kv, written = SequenceKV(KVStore(6), order), []
    for number, size in enumerate(sizes):
        if sum(sizes[: number + 1]) <= 96:
            written.append(rows(size, number))
            put(kv, written[-1])
    wanted = torch.cat(written, 1)
    for layer in (0, 1):
        assert torch.allclose(held(kv, layer), wanted, atol=1e-6)


def test_pages_in_a_row_are_read_without_a_copy() -> None:
    store = KVStore(4)
    kv = SequenceKV(store, [1, 2, 3])
    put(kv, rows(40, 1))
    keys, _ = kv.read(0, 0)
    assert keys.data_ptr() == store.layers[0][0][:, 16:].data_ptr()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 40])
def test_a_fork_shares_the_past_and_not_the_future(tokens: int) -> None:
    store = KVStore(8)
    kv = SequenceKV(store, [0, 1, 2, 3])
    past = rows(tokens, 1)
    put(kv, past)
    shared = list(range(tokens // 16))
    twin = kv.fork([*shared, *range(4, 8 - len(shared))])
    ours, theirs = rows(5, 2), rows(5, 3)
    put(kv, ours)
    put(twin, theirs)
    assert torch.allclose(held(kv, 1), torch.cat([past, ours], 1), atol=1e-6)
    assert torch.allclose(held(twin, 1), torch.cat([past, theirs], 1), atol=1e-6)


def test_more_rows_than_pages_is_a_fault() -> None:
    kv = SequenceKV.alone(16)
    with pytest.raises(AssertionError, match="promised room"):
        kv.write(0, rows(17, 1), rows(17, 1))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is given back on Linux")
def test_pages_that_stay_empty_give_their_memory_back_and_no_others() -> None:
    """Rows of 1 KiB: a page of the KV is several of the system's, wherever the buffer begins."""
    store = KVStore(4)
    ones = torch.ones(2, 4 * PAGE_TOKENS, 256)
    for buffer in store.layer(0, ones, ones):
        buffer.copy_(ones)
    store.give_back([1, 3])
    for buffer in store.layers[0]:
        by_page = buffer.view(2, 4, PAGE_TOKENS, 256)
        assert bool((by_page[:, [0, 2]] == 1).all())
        gone = (by_page[:, [1, 3]] == 0).sum()
        assert gone >= 4 * (PAGE_TOKENS * 256 - 2 * mmap.PAGESIZE // 4)
