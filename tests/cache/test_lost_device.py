"""A GPU that fails at any moment: one clear error, told again, and a cache that can be closed."""

import random
from pathlib import Path

import pytest
import torch

from cuda_rig import OnGpu
from moestro.cache import CacheError, DeviceFailed, HostMode, Lru, Phase
from tiny_packs import build_tiny, tiny_spec

SPEC = tiny_spec(6, 6, 6)


def live(rig: OnGpu) -> None:
    dice = random.Random(3)
    for turn in range(30):
        with rig.cache.acquire(turn % 3, dice.sample(range(6), 4), Phase.DECODE) as lease:
            for expert, tensors in lease:
                rig.look(tensors, turn % 3, expert)
                rig.end(0)
        rig.cache.prefetch((turn + 1) % 3, dice.sample(range(6), 2), 2)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("mode", [HostMode.WHOLE, HostMode.EXCLUSIVE])
def test_a_device_that_fails_is_named_at_every_turn(tmp_path: Path, mode: HostMode) -> None:
    for calls in range(0, 120, 5):
        rig = OnGpu(build_tiny(tmp_path / "tiny.pack", SPEC), 4, 2, mode, Lru(), Lru())
        rig.cuda.stick_in(calls)
        with pytest.raises((DeviceFailed, torch.AcceleratorError)) as first:  # or the test's kernel
            live(rig)
        if isinstance(first.value, DeviceFailed):
            assert isinstance(first.value, CacheError)
            assert "cuda:0 failed: CUDA error: illegal address" in str(first.value)
        for _ in range(2):
            with (
                pytest.raises(DeviceFailed, match="start again"),
                rig.cache.acquire(0, list(range(6)), Phase.DECODE) as lease,
            ):
                for _ in lease:
                    pass
        rig.close()
        rig.close()
        assert rig.disk.closed
