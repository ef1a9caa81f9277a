"""How many threads compute, and which limit decides, on machines made of files."""

import logging
from pathlib import Path

import psutil
import pytest
import torch

import tiny
from engine_kit import opened
from moestro.engine import EngineConfig, StartError
from moestro.engine.facts import set_threads
from moestro.engine.facts.threads import (
    CpuLimit,
    CpuLimits,
    Threads,
    choose_threads,
    cpu_limits,
)
from moestro.engine.planner import plan_model

CPUS, GROUPS = "sys/devices/system/cpu", "sys/fs/cgroup"


def machine(root: Path, cpus: int, files: dict[str, str], siblings: int = 1) -> Path:
    """Its proc and sys: `siblings` hyperthreads of a core are numbered as far apart as can be."""
    cores = cpus // siblings
    topology = {
        f"{CPUS}/cpu{cpu}/topology/thread_siblings_list": ",".join(
            str(cpu % cores + thread * cores) for thread in range(siblings)
        )
        for cpu in range(cpus)
    }
    for name, text in {f"{CPUS}/online": f"0-{cpus - 1}", **topology, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def chosen(root: Path, mask: frozenset[int] | None = None) -> str:
    """The default, as the log says it, with the machine's files as names."""
    every = frozenset(range(16)) if mask is None else mask
    threads = choose_threads(None, cpu_limits(root, every))
    return f"{threads.count} ({threads.why.replace(f'{root}/', '')})"


@pytest.mark.parametrize(
    ("own", "files", "wanted"),
    [
        ("0::/", {}, "15 (16 physical cores, less one)"),
        (
            "0::/",
            {f"{GROUPS}/cpu.max": "400000 100000"},
            "3 (cpu quota of 4.0 in GROUPS/cpu.max, less one)",
        ),
        (
            "0::/a/b",
            {f"{GROUPS}/a/b/cpu.max": "max 100000", f"{GROUPS}/a/cpu.max": "150000 100000"},
            "1 (cpu quota of 1.5 in GROUPS/a/cpu.max)",
        ),
        (
            "0::/a",
            {f"{GROUPS}/a/cpu.max": "20000 100000"},
            "1 (cpu quota of 0.2 in GROUPS/a/cpu.max)",
        ),
        (
            "0::/a",
            {f"{GROUPS}/a/cpu.max": "390000 100000"},
            "3 (cpu quota of 3.9 in GROUPS/a/cpu.max)",
        ),
        ("0::/", {f"{GROUPS}/cpu.max": "3200000 100000"}, "15 (16 physical cores, less one)"),
        ("0::/", {f"{GROUPS}/cpu.max": "what is this"}, "15 (16 physical cores, less one)"),
        # The host's path, seen from inside a container.
        (
            "0::/pod/c1",
            {f"{GROUPS}/cpu.max": "200000 100000"},
            "2 (cpu quota of 2.0 in GROUPS/cpu.max)",
        ),
        (
            "7:cpu,cpuacct:/a/b\n0::/",
            {
                f"{GROUPS}/cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1",
                f"{GROUPS}/cpu,cpuacct/a/b/cpu.cfs_period_us": "100000",
                f"{GROUPS}/cpu,cpuacct/a/cpu.cfs_quota_us": "100000",
                f"{GROUPS}/cpu,cpuacct/a/cpu.cfs_period_us": "50000",
            },
            "2 (cpu quota of 2.0 in GROUPS/cpu,cpuacct/a/cpu.cfs_quota_us)",
        ),
        (
            "7:cpu:/a",
            {
                f"{GROUPS}/cpu/a/cpu.cfs_quota_us": "600000",
                f"{GROUPS}/cpu/a/cpu.cfs_period_us": "100000",
            },
            "5 (cpu quota of 6.0 in GROUPS/cpu/a/cpu.cfs_quota_us, less one)",
        ),
        (
            "3:cpuset:/a\n0::/",
            {
                f"{GROUPS}/cpuset/a/cpuset.effective_cpus": "0-1,8",
                f"{GROUPS}/cpuset/cpuset.cpus": "0-15",
            },
            "3 (cpuset of 3 in GROUPS/cpuset/a/cpuset.effective_cpus)",
        ),
        (
            "3:cpuset:/a",
            {f"{GROUPS}/cpuset/a/cpuset.cpus": "4-8"},
            "4 (cpuset of 5 in GROUPS/cpuset/a/cpuset.cpus, less one)",
        ),
        (
            "0::/a/b",
            {
                f"{GROUPS}/a/b/cpuset.cpus.effective": "0-15",
                f"{GROUPS}/a/cpuset.cpus.effective": "2,3",
            },
            "2 (cpuset of 2 in GROUPS/a/cpuset.cpus.effective)",
        ),
        ("0::/a", {f"{GROUPS}/a/cpuset.cpus.effective": ""}, "15 (16 physical cores, less one)"),
    ],
)
def test_the_tightest_limit_decides(
    own: str, files: dict[str, str], wanted: str, tmp_path: Path
) -> None:
    root = machine(tmp_path, 16, {"proc/self/cgroup": own, **files})
    assert chosen(root) == wanted.replace("GROUPS", GROUPS)


def test_a_mask_of_one_among_sixteen_cores_gives_one_thread(tmp_path: Path) -> None:
    assert chosen(machine(tmp_path, 16, {}), frozenset({5})) == "1 (affinity mask of 1)"


def test_a_cpuset_is_named_rather_than_the_mask_that_follows_from_it(tmp_path: Path) -> None:
    root = machine(tmp_path, 16, {f"{GROUPS}/cpuset.cpus.effective": "0-3"})
    wanted = f"3 (cpuset of 4 in {GROUPS}/cpuset.cpus.effective, less one)"
    assert chosen(root, frozenset(range(4))) == wanted
    assert chosen(root, frozenset({0, 1})) == "2 (affinity mask of 2)"


def test_hyperthreads_of_a_core_count_once_within_what_is_allowed(tmp_path: Path) -> None:
    root = machine(tmp_path / "all", 16, {}, siblings=2)
    assert chosen(root) == "7 (8 physical cores, less one)"
    assert chosen(root, frozenset({0, 1, 8, 9})) == "2 (2 physical cores in 4 allowed CPUs)"
    assert chosen(root, frozenset({0, 8})) == "1 (1 physical core in 2 allowed CPUs)"
    assert chosen(root, frozenset({0, 1})) == "2 (affinity mask of 2)"
    files = {f"{GROUPS}/cpuset.cpus.effective": "0-3,8-11"}
    root = machine(tmp_path / "some", 16, files, siblings=2)
    assert chosen(root) == "3 (4 physical cores in 8 allowed CPUs, less one)"


def test_without_a_topology_the_system_is_asked(tmp_path: Path) -> None:
    limits = cpu_limits(tmp_path, frozenset({0}))
    assert limits.cores.cpus == 1
    assert limits.logical.cpus == psutil.cpu_count()
    every = frozenset(range(psutil.cpu_count() or 1))
    assert cpu_limits(tmp_path, every).cores.cpus == psutil.cpu_count(logical=False)


@pytest.mark.parametrize(
    ("cores", "threads"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (64, 63)], ids=str
)
def test_one_less_where_that_leaves_more_than_two(cores: int, threads: int) -> None:
    limits = CpuLimits((), CpuLimit(128, "128 logical CPUs"), CpuLimit(cores, "cores"))
    less_one = ", less one" if threads < cores else ""
    assert choose_threads(None, limits) == Threads(threads, f"cores{less_one}")


@pytest.mark.parametrize(
    ("narrower", "most", "why"),
    [
        ((), 16, "16 logical CPUs"),
        ((CpuLimit(1.5, "cpu quota of 1.5 in F"),), 2, "cpu quota of 1.5 in F"),
        ((CpuLimit(4, "M"), CpuLimit(3, "C"), CpuLimit(3.1, "Q")), 3, "C"),
        ((CpuLimit(20.0, "cpu quota of 20.0 in F"),), 16, "16 logical CPUs"),
    ],
)
def test_more_threads_than_may_run_are_refused(
    narrower: tuple[CpuLimit, ...], most: int, why: str
) -> None:
    """Hyperthreads may be asked for."""
    limits = CpuLimits(narrower, CpuLimit(16, "16 logical CPUs"), CpuLimit(8, "8 physical cores"))
    assert choose_threads(most, limits) == Threads(most, f"--threads {most}")
    with pytest.raises(StartError) as caught:
        choose_threads(most + 1, limits)
    assert str(caught.value) == (
        f"--threads {most + 1}: at most {most} can run here ({why}); lower it, or leave it out"
    )


def test_what_is_chosen_is_in_force_here() -> None:
    before = torch.get_num_threads()
    try:
        found = set_threads(None)
        assert found == choose_threads(None, cpu_limits())
        assert torch.get_num_threads() == found.count
        assert set_threads(1) == Threads(1, "--threads 1")
        assert torch.get_num_threads() == 1
        with pytest.raises(StartError, match="^--threads 100000: at most "):
            set_threads(100_000)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_start_says_why_so_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moestro.engine")
    with opened(tiny.build("mixtral", tmp_path / "model"), tmp_path / "cache", threads=1):
        assert "threads: 1 (--threads 1)" in caplog.messages


def test_too_many_are_refused_before_the_model_is_looked_at(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    with (
        pytest.raises(StartError, match="^--threads 9999: "),
        opened(nowhere, tmp_path, threads=9999),
    ):
        pass
    with pytest.raises(StartError, match="^--threads 9999: "):
        plan_model(EngineConfig(nowhere, tmp_path, threads=9999), 1e9)
