"""How much host memory CUDA pins, piece by piece, and how long that takes."""

from typing import Any

import psutil
import torch

from moestro.cache import human_bytes
from moestro.engine.facts import GIB

from .bench import Bench
from .found import CannotRun, Found

LEFT_ALONE_BYTES = 2 * GIB  # of what is available


def pinning(bench: Bench, found: Found) -> None:
    """Each piece is given back before the next one is tried."""
    room_bytes = psutil.virtual_memory().available - LEFT_ALONE_BYTES
    tried = [size for size in bench.sizes.register_bytes if size <= room_bytes]
    rows = found.facts["registered"] = list[dict[str, Any]]()
    for size_bytes in bench.sizes.register_bytes:
        if size_bytes not in tried:
            found.lines.append(f"{human_bytes(size_bytes)}: not run, so much is not available")
            continue
        row = _register(size_bytes, bench)
        rows.append(row)
        found.lines.append(
            f"{human_bytes(size_bytes)}: "
            + (
                f"pinned in {row['took_s']:.2f} s ({row['bytes_per_s'] / GIB:.1f} GiB/s), released"
                f" in {row['release_s']:.2f} s"
                if row["code"] == 0
                else f"refused after {row['took_s']:.2f} s, error {row['code']}"
            )
        )
    if not rows:
        raise CannotRun(f"less than {human_bytes(bench.sizes.register_bytes[0])} to spare")
    if rows[0]["code"]:
        found.problems.append("not even the smallest piece was pinned")


def _register(size_bytes: int, bench: Bench) -> dict[str, Any]:
    """Memory that was never touched, as the host tier's: registering faults it in."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    block = torch.empty(size_bytes, dtype=torch.uint8)
    began_s = bench.clock()
    code = int(runtime.cudaHostRegister(block.data_ptr(), size_bytes, 0))
    took_s = bench.clock() - began_s
    row: dict[str, Any] = {"size_bytes": size_bytes, "code": code, "took_s": took_s}
    if code:
        _forget_error(bench.device)
        return row
    row["bytes_per_s"] = size_bytes / took_s
    began_s = bench.clock()
    row["release_code"] = int(runtime.cudaHostUnregister(block.data_ptr()))
    row["release_s"] = bench.clock() - began_s
    return row


def _forget_error(device: torch.device) -> None:
    """CUDA reports a refused call once more, with the next kernel: let it be this one."""
    try:
        torch.zeros(1, device=device)
    except RuntimeError:
        return
