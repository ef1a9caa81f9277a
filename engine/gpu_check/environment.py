"""Which GPU there is, or in words why none; and facts of the machine that figures need beside them.

No names of hosts or users.
"""

import ctypes
import os
import platform
import resource
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from moestro.cache import human_bytes
from moestro.engine.facts import StartError

from .bench import Bench
from .found import Found

IMAGINED = "imagined: no GPU"
LOOK = "moestro gpu-check --device cpu shows what a report looks like"
PACKAGES = ("moestro", "torch", "transformers", "bitsandbytes", "triton")
SMI_FIELDS = (
    "driver_version",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
)
SMI_LIMIT_S = 20.0
ASYNC_ENGINE_COUNT = 40  # CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT of cuda.h


def find_device(name: str) -> tuple[torch.device, str]:
    """`cuda`, `cuda:N` or `cpu` -> the device and its model's name.

    Raises StartError with what torch says and what to do about it.
    """
    if name == "cpu":
        return torch.device("cpu"), IMAGINED
    if not name.startswith("cuda"):
        raise StartError(f"--device {name}: a GPU is checked: cuda, cuda:N, or cpu to imagine one")
    if torch.version.cuda is None:
        raise StartError(
            f"no GPU: torch {torch.__version__} is built without CUDA: install a torch for your GPU"
            f" (make setup MOESTRO_TORCH=torch, or pip install torch); {LOOK}"
        )
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        count = torch.cuda.device_count()
    except (RuntimeError, AssertionError) as error:
        raise StartError(_why(str(error).splitlines()[0])) from error
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise StartError(
            f"--device {name}: torch {torch.__version__} sees {count} CUDA devices (a container"
            f" needs `docker run --gpus all`; CUDA_VISIBLE_DEVICES hides some); {LOOK}"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device, torch.cuda.get_device_name(device)


def _why(said: str) -> str:
    built = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    if "too old" in said:
        advice = (
            "update NVIDIA's driver, or install a torch for an older CUDA"
            " (pip install torch with PyTorch's index for that version)"
        )
    else:
        advice = "install NVIDIA's driver; in a container, use `docker run --gpus all`"
    return f"no GPU: {built} says: {said}: {advice}; {LOOK}"


def environment(bench: Bench, found: Found) -> None:
    facts = found.facts
    facts["versions"] = {name: _version(name) for name in PACKAGES}
    facts["cuda_of_torch"] = torch.version.cuda
    facts["python"] = platform.python_version()
    facts["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    facts["wsl"] = "microsoft" in platform.release().lower()
    facts["container"] = _in_container()
    facts["cpus"] = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    facts["ram_total_bytes"], facts["ram_available_bytes"] = memory.total, memory.available
    facts["memlock_limit_bytes"] = _memlock()
    found.lines += _machine_lines(facts)
    if bench.imagined:
        found.lines.append("GPU, driver, PCIe link, copy engines: not run, no GPU")
        return
    facts["gpu"] = _gpu(bench.device)
    facts["nvidia_smi"] = _nvidia_smi(bench.device)
    found.lines += _gpu_lines(facts)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _in_container() -> bool:
    return any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))


def _memlock() -> int | None:
    """None: no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _gpu(device: torch.device) -> dict[str, Any]:
    known = torch.cuda.get_device_properties(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return {
        "name": known.name,
        "compute_capability": f"{known.major}.{known.minor}",
        "multiprocessors": known.multi_processor_count,
        "memory_free_bytes": free_bytes,
        "memory_total_bytes": total_bytes,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "copy_engines": _copy_engines(device),
    }


def _copy_engines(device: torch.device) -> int | None:
    """As the driver says; None where its library cannot be asked."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, count = ctypes.c_int(), ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device.index or 0)
    failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(count), ASYNC_ENGINE_COUNT, handle)
    return None if failed else count.value


def _nvidia_smi(device: torch.device) -> dict[str, str] | None:
    """None where the program is not here or does not answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [
        program,
        f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}",
        f"--query-gpu={','.join(SMI_FIELDS)}",
        "--format=csv,noheader,nounits",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_LIMIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(SMI_FIELDS, (value.strip() for value in done.stdout.split(",")), strict=False))


def _machine_lines(facts: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {found or 'absent'}" for name, found in facts["versions"].items())
    limit = facts["memlock_limit_bytes"]
    return [
        f"{versions}, CUDA of torch {facts['cuda_of_torch'] or 'none'}",
        f"{facts['system']}, Python {facts['python']}, WSL {_yes(facts['wsl'])},"
        f" container {_yes(facts['container'])}, {facts['cpus']} CPUs",
        f"RAM {human_bytes(facts['ram_available_bytes'])} available of"
        f" {human_bytes(facts['ram_total_bytes'])}, memlock"
        f" {'unlimited' if limit is None else human_bytes(limit)}",
    ]


def _gpu_lines(facts: dict[str, Any]) -> list[str]:
    gpu, smi = facts["gpu"], facts["nvidia_smi"]
    engines = "?" if gpu["copy_engines"] is None else gpu["copy_engines"]
    lines = [
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, bf16 {_yes(gpu['bf16'])},"
        f" {human_bytes(gpu['memory_free_bytes'])} free of"
        f" {human_bytes(gpu['memory_total_bytes'])}, copy engines {engines}"
    ]
    if smi is None:
        return [*lines, "driver and PCIe link: nvidia-smi did not answer"]
    driver, gen, most_gen, width, most_width = (smi.get(name, "?") for name in SMI_FIELDS)
    return [
        *lines,
        f"driver {driver}, PCIe generation {gen} at rest of {most_gen}, width {width} of"
        f" {most_width}",
    ]


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"
