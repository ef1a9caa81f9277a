"""A tiny pack in three layers (small, small, large blobs), and caches over it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manual_reader import Bench, ManualReader
from moestro.cache import ExpertCache, Pack, PackSpec, plan_slots
from tiny_packs import build_tiny, tiny_spec


@pytest.fixture
def spec() -> PackSpec:
    return tiny_spec(6, 6, 6)


@pytest.fixture
def pack(tmp_path: Path, spec: PackSpec) -> Iterator[Pack]:
    pack = build_tiny(tmp_path / "tiny.pack", spec)
    yield pack
    pack.close()


@pytest.fixture
def bench(pack: Pack) -> Callable[[int], Bench]:
    """Makes a cache of so many slots, whose reads end when the test says so."""

    def make(slots: int) -> Bench:
        reader = ManualReader(pack)
        plan = plan_slots(slots * pack.spec.slot_bytes, pack.spec, 1)
        return Bench(ExpertCache(pack, plan, reader=reader), reader)

    return make


@pytest.fixture
def pack_with_flipped_tail(tmp_path: Path, spec: PackSpec) -> Iterator[ExpertCache]:
    """A cache with real reads over a pack that is not verified on opening; its last bit lies."""
    path = tmp_path / "flipped.pack"
    build_tiny(path, spec).close()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    pack = Pack.open(path, spec, verify_up_to_bytes=0)
    cache = ExpertCache(pack, plan_slots(6 * spec.slot_bytes, spec, 1))
    yield cache
    cache.close()
