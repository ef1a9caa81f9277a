"""Where a model computes. Every line of the engine that needs CUDA to serve is in this file.

The rest of the engine makes its tensors beside those it is given, so that a `Device` which is only
imagined (tests/support/imagined.py) runs the same code on a CPU.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moestro.cache import STAGING_BYTES, Pack, TierPlan, Wiring, cuda, human_bytes

from .config import EngineConfig
from .errors import StartError
from .threads import Threads, choose_threads, cpu_limits
from .units import GIB

NAMES = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of a device, as found before anything of the model is in it."""

    name: str
    free_bytes: int
    total_bytes: int

    @property
    def limit(self) -> tuple[int, str]:
        return self.free_bytes, f"free of {human_bytes(self.total_bytes)} on {self.name}"


@dataclass(frozen=True, slots=True)
class Device:
    """Facts, found before anything is allocated."""

    place: torch.device
    compute_dtype: torch.dtype
    why: str  # in words, for the log
    room: Room | None = None  # of its own; None: it computes in the host's memory
    wire: Callable[[Pack, TierPlan], Wiring] | None = None  # how experts get there, if it has room
    staging_bytes: int = 0  # of the host tier, that `wire` may need
    grouped_heads: bool = True  # its attention kernels take key heads that query heads share

    def fault(self) -> str | None:
        """Why nothing works there any more; None: it does.

        Waits for all that is queued there: to be asked after an error that may be its.
        """
        if self.place.type != "cuda":
            return None
        try:
            torch.cuda.synchronize(self.place)
        except RuntimeError as error:
            first_line = str(error).splitlines()[0]
            return f"{self.place} failed: {first_line}; start again, and see the driver's log"
        return None


UNSEEN_BYTES = GIB
"""Of a card that is not here: its driver's context, and a desktop. An assumption."""


def planned_card(memory_bytes: int) -> Device:
    """A GPU that need not be here, to plan for: nothing can compute on it.

    Raises StartError where it would hold nothing at all.
    """
    free_bytes = memory_bytes - UNSEEN_BYTES
    if free_bytes <= 0:
        raise StartError(
            f"--device-memory {human_bytes(memory_bytes)}: a card's driver alone takes about"
            f" {human_bytes(UNSEEN_BYTES)}; say how much memory the card has, such as 12GiB"
        )
    room = Room("the card that is planned for", free_bytes, memory_bytes)
    why = f"a card of {human_bytes(memory_bytes)}, planned for"
    place = torch.device("cuda", 0)
    return Device(place, torch.bfloat16, why, room, staging_bytes=STAGING_BYTES)


CPU = Device(torch.device("cpu"), torch.float32, "--device cpu")


def choose(config: EngineConfig) -> Device:
    """What `--device` names. Raises StartError where it is not here."""
    name = config.device
    if not NAMES.fullmatch(name):
        raise StartError(f"--device {name}: this build computes on auto, cpu, cuda and cuda:N")
    if name == "cpu":
        return CPU
    if name != "auto":
        return _cuda(name, f"--device {name}")
    if config.link is not None:
        return replace(CPU, why="--device auto: --emulate-link imagines a device beside the cpu")
    if not torch.cuda.is_available():
        return replace(CPU, why=f"--device auto: {_no_cuda()}")
    return _cuda("cuda", "--device auto: CUDA is here")


NVIDIA_FILES = ("dev/nvidia[0-9]*", "usr/lib/wsl/lib/libcuda.so.1")  # where a card is


def unused_gpu(device: Device, root: Path = Path("/")) -> str | None:
    """Why a card that the system shows is not computed on, and the cure; None: it is, or none is.

    `root` is where dev and usr are.
    """
    if device.room is not None or not any(any(root.glob(each)) for each in NVIDIA_FILES):
        return None
    if torch.cuda.is_available():
        return f"an NVIDIA GPU is here and not used ({device.why}): --device auto computes on it"
    return f"an NVIDIA GPU is here and not used: {_no_cuda()}; {_cure()}"


def _no_cuda() -> str:
    """In torch's own words, where it has any."""
    built = f"torch {torch.__version__}"
    if torch.version.cuda is None:
        return f"{built} is built without CUDA"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return f"{built} for CUDA {torch.version.cuda}: {str(error).splitlines()[0]}"
    return f"{built} sees no CUDA device"


def _cure() -> str:
    if torch.version.cuda is None:
        return "install a torch for your GPU (make setup MOESTRO_TORCH=torch)"
    return "update NVIDIA's driver, or install a torch for the CUDA that it has"


def _cuda(name: str, why: str) -> Device:
    """A GPU, made the calling thread's own."""
    if not torch.cuda.is_available():
        raise StartError(f"--device {name}: {_no_cuda()}; {_cure()}, or use --device cpu")
    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise StartError(f"--device {name}: there are {count} CUDA devices, cuda:0 is the first")
    place = torch.device("cuda", index)
    try:
        torch.cuda.set_device(place)
        free_bytes, total_bytes = torch.cuda.mem_get_info(place)
        model = torch.cuda.get_device_name(place)
        grouped_heads = torch.cuda.get_device_capability(place) >= (8, 0)  # where flash runs
    except RuntimeError as error:
        raise StartError(f"--device {name}: {str(error).splitlines()[0]}") from error
    half = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device(
        place,
        torch.bfloat16 if half else torch.float16,
        why,
        Room(f"{model}, {place}", free_bytes, total_bytes),
        partial(cuda, place),
        STAGING_BYTES,
        grouped_heads,
    )


def index_on(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 [n] on `device`, which is not made to wait: out of pinned memory, where it is a GPU."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.long, device=device)
    pinned = torch.tensor(values, dtype=torch.long, pin_memory=True)
    return pinned.to(device, non_blocking=True)


class Indices:
    """Like `index_on`, for the middle of a layer: to a GPU, nothing crosses.

    What crosses waits in the copy engine for the experts that were queued before it, and what is
    computed next would wait for it. So indices are put together there, out of a range.
    """

    LEAST_NUMBERS = 256

    def __init__(self) -> None:
        self._range: torch.Tensor | None = None  # int64, on the GPU

    def on(self, values: Sequence[int], device: torch.device) -> torch.Tensor:
        """int64 [n] on `device`, valid for reading."""
        if device.type != "cuda" or not values:
            return index_on(values, device)
        most = max(values)
        if self._range is None or len(self._range) <= most:
            count = max(self.LEAST_NUMBERS, 1 << most.bit_length())
            self._range = torch.arange(count, device=device)
        runs = [self._range[start:end] for start, end in runs_of(values)]
        return runs[0] if len(runs) == 1 else torch.cat(runs)


def runs_of(values: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) of each run of neighbours, in order: 4 5 6 1 is (4, 7), (1, 2)."""
    found: list[tuple[int, int]] = []
    for value in values:
        if found and found[-1][1] == value:
            found[-1] = (found[-1][0], value + 1)
        else:
            found.append((value, value + 1))
    return found


class HostCopy:
    """Numbers on their way to the host: asked for now, read when the device has got so far.

    What is queued between does not delay them.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self._numbers, self._there = numbers, None
        if numbers.device.type == "cuda":
            pinned = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers = pinned.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record(torch.cuda.current_stream(numbers.device))

    def tolist(self) -> Any:
        """As torch.Tensor.tolist."""
        if self._there is not None:
            self._there.synchronize()
        return self._numbers.tolist()


def set_threads(wanted: int | None) -> Threads:
    """Those that compute, from now on; None: as many as may. Raises StartError where too many."""
    threads = choose_threads(wanted, cpu_limits())
    torch.set_num_threads(threads.count)
    return threads


FEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class TorchThreads:
    """How many threads torch's own operations get, by the size of a step.

    Where the library computes, torch's threads have next to nothing to do in a small step, and
    would spin on the cores that the library's threads need.
    """

    small: int
    large: int

    def settle(self, tokens: int) -> None:
        torch.set_num_threads(self.small if tokens <= FEW_TOKENS else self.large)
