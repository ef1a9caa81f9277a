"""Where limits are found, and what of them is available now."""

from pathlib import Path

import psutil
import pytest

from moestro.engine import StartError
from moestro.engine.facts.units import MIB
from moestro.engine.planning.limits import (
    is_in_memory,
    memory_available,
    memory_limit,
    resident_bytes,
)


def groups(root: Path, own: str, limits: dict[str, object]) -> Path:
    """A machine's proc and sys with the process in the groups `own`."""
    for name, text in {"proc/self/cgroup": own, **limits}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("own", "limits", "wanted", "place"),
    [
        ("0::/", {f"{V2}/memory.max": 7 * MIB}, 7 * MIB, "cgroup/memory.max"),
        ("0::/a/b", {f"{V2}/a/b/memory.max": 5 * MIB}, 5 * MIB, "a/b/memory.max"),
        (
            "0::/a/b",
            {f"{V2}/a/b/memory.max": "max", f"{V2}/a/memory.max": 6 * MIB},
            6 * MIB,
            "a/memory.max",
        ),
        (
            "12:pids:/x\n4:memory:/a/b\n0::/",
            {
                f"{V1}/memory.limit_in_bytes": 1 << 62,
                f"{V1}/a/memory.limit_in_bytes": 8 * MIB,
                f"{V1}/a/b/memory.limit_in_bytes": 9 * MIB,
            },
            8 * MIB,
            "a/memory.limit_in_bytes",
        ),
        # The host's path, seen from inside a container.
        ("0::/docker/c1", {f"{V2}/memory.max": 4 * MIB}, 4 * MIB, "cgroup/memory.max"),
        ("0::/../outside", {f"{V2}/memory.max": 4 * MIB}, 4 * MIB, "cgroup/memory.max"),
        ("0::/a", {f"{V2}/unified/a/memory.max": 3 * MIB}, 3 * MIB, "unified/a/memory.max"),
        # Above memory.high the kernel makes every allocation wait.
        (
            "0::/a",
            {f"{V2}/a/memory.max": 8 * MIB, f"{V2}/a/memory.high": 6 * MIB},
            6 * MIB,
            "a/memory.high",
        ),
        (
            "0::/a",
            {f"{V2}/a/memory.max": 5 * MIB, f"{V2}/a/memory.high": "max"},
            5 * MIB,
            "a/memory.max",
        ),
    ],
)
def test_the_tightest_group_on_the_way_up_counts(
    own: str, limits: dict[str, object], wanted: int, place: str, tmp_path: Path
) -> None:
    limit, name = memory_limit(groups(tmp_path, own, limits))
    assert limit == wanted
    assert name.endswith(place)


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    (tmp_path / V2).mkdir(parents=True)
    limit, name = memory_limit(tmp_path)
    assert (limit, name) == (psutil.virtual_memory().total, "the machine's memory")
    (tmp_path / V2 / "memory.max").write_text("1048576")
    assert memory_limit(tmp_path)[0] == MIB


def test_the_limit_is_found() -> None:
    limit, name = memory_limit()
    assert limit > 100 * MIB and name


@pytest.mark.parametrize(
    ("own", "limits", "wanted"),
    [
        (
            "0::/a",
            {
                f"{V2}/a/memory.max": 100 * MIB,
                f"{V2}/a/memory.current": 90 * MIB,
                f"{V2}/a/memory.stat": f"anon 5\nactive_file {3 * MIB}\ninactive_file {40 * MIB}",
            },
            53 * MIB,
        ),
        (
            "0::/a",
            {
                f"{V2}/a/memory.max": 100 * MIB,
                f"{V2}/a/memory.high": 60 * MIB,
                f"{V2}/a/memory.current": 50 * MIB,
            },
            10 * MIB,
        ),
        ("0::/a", {f"{V2}/a/memory.max": 100 * MIB, f"{V2}/a/memory.current": 120 * MIB}, 0),
        (
            "4:memory:/a",
            {
                f"{V1}/a/memory.limit_in_bytes": 80 * MIB,
                f"{V1}/a/memory.usage_in_bytes": 70 * MIB,
                f"{V1}/a/memory.stat": f"total_active_file {MIB}\ntotal_inactive_file {MIB}",
            },
            12 * MIB,
        ),
    ],
)
def test_the_page_cache_of_a_group_is_available(
    own: str, limits: dict[str, object], wanted: int, tmp_path: Path
) -> None:
    assert memory_available(groups(tmp_path, own, limits)) == wanted


def test_without_groups_the_machine_says_what_is_available(tmp_path: Path) -> None:
    most = psutil.virtual_memory().total
    assert 0 < memory_available(tmp_path) <= most


def test_the_nearest_mount_says_whether_files_are_memory(tmp_path: Path) -> None:
    mounts = "/dev/vda / ext4 rw 0 0\ntmpfs /fast tmpfs rw 0 0\n/dev/vdb /fast/disk xfs rw 0 0"
    root = groups(tmp_path, "0::/", {"proc/self/mounts": f"{mounts}\ntmpfs /a\\040b tmpfs rw 0 0"})
    assert is_in_memory(Path("/fast/cache"), root)
    assert is_in_memory(Path("/a b/cache"), root)
    assert not is_in_memory(Path("/fast/disk/cache"), root)
    assert not is_in_memory(Path("/home"), root)
    assert not is_in_memory(Path("/home"), tmp_path / "nowhere")


def test_a_machine_without_proc_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    for ask in (memory_limit, memory_available, resident_bytes):
        with pytest.raises(StartError, match=r"cannot tell how much memory .* mount /proc"):
            ask()
