import torch

from moestro.cache.tiers.slots import SlotArena
from tiny_packs import LARGE, SMALL


def test_views_and_buffer_of_a_slot_are_the_same_bytes() -> None:
    arena = SlotArena(3, LARGE.stride_bytes, [[SMALL], [LARGE]])
    arena.buffer(1, SMALL.stride_bytes)[:] = bytes([1, 0, 0, 0]) * (SMALL.stride_bytes // 4)
    up = arena.views[0][1]["up"]
    assert bool((up.view(torch.int32) == 1).all())
    assert up.shape == (3, 5)
    assert not arena.views[0][0]["up"].any()
    assert not arena.views[0][2]["up"].any()


def test_slots_begin_at_pages_and_tensors_at_cache_lines() -> None:
    arena = SlotArena(3, LARGE.stride_bytes, [[SMALL], [LARGE]])
    for layer in arena.views:
        for views in layer:
            pointers = [view.data_ptr() for view in views.values()]
            assert pointers[0] % 4096 == 0
            assert all(pointer % 64 == 0 for pointer in pointers)


def test_layers_laid_out_alike_share_their_views() -> None:
    arena = SlotArena(2, LARGE.stride_bytes, [[SMALL], [LARGE], [SMALL]])
    assert arena.views[0] is arena.views[2]
    assert arena.views[0] is not arena.views[1]


def test_a_slot_of_a_mixed_layer_shows_whose_it_is() -> None:
    arena = SlotArena(2, LARGE.stride_bytes, [[SMALL, LARGE], [SMALL]])
    assert arena.views[0] is not arena.views[1]
    arena.show(0, 1, LARGE)
    assert arena.views[0][1]["up"].shape == (40, 30)
    assert arena.views[0][0]["up"].shape == arena.views[1][1]["up"].shape == (3, 5)
    first = arena.views[0][1]
    arena.show(0, 1, SMALL)
    assert arena.views[0][1] is arena.views[1][1]
    arena.show(0, 1, LARGE)
    assert arena.views[0][1] is first  # made once: whoever knows it by identity is right
