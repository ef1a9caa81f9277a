"""Puts a FakeCuda in place of torch.cuda, for the code under test as it is shipped.

Tensors "on cuda" are CPU tensors whose memory the fake knows. A function mode makes them where a
device is named or memory is pinned, and lets them say that they are there; a dispatch mode sees
every operation on them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fake_cuda import Event, FakeCuda, Stream
from fake_cuda_memory import Place

_aten = torch.ops.aten
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_WRITES_ONLY = ("fill_", "zero_", "copy_")
_ANYWHERE = ("index", "index_put_", "_index_put_impl_")  # take indices from the host, too
_PLACE: Any = torch.Tensor.device
_IS_CUDA: Any = torch.Tensor.is_cuda
_GETTERS = {_PLACE.__get__: "device", _IS_CUDA.__get__: "is_cuda"}


@contextmanager
def installed(cuda: FakeCuda) -> Iterator[FakeCuda]:
    """Inside, torch.cuda is `cuda`."""
    with pytest.MonkeyPatch.context() as patched:
        names: dict[str, Any] = {
            "Stream": partial(Stream, cuda),
            "Event": partial(Event, cuda),
            "stream": partial(_stream, cuda),
            "current_stream": lambda device=None: cuda.current,
            "default_stream": lambda device=None: cuda.default,
            "synchronize": cuda.synchronize,
            "mem_get_info": cuda.mem_get_info,
            "cudart": lambda: _Runtime(cuda),
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "set_device": lambda device: cuda.call(),
            "get_device_name": lambda device=None: "an imagined GPU",
            "get_device_capability": lambda device=None: (8, 0),
            "is_bf16_supported": lambda including_emulation=True: True,
        }
        for name, value in names.items():
            patched.setattr(torch.cuda, name, value)
        patched.setattr(CausalBias, "__new__", staticmethod(_without_modes))
        with _Kernels(cuda), _Places(cuda):
            yield cuda


def _without_modes(kind: type[torch.Tensor], *_: object) -> torch.Tensor:
    """A tensor in name only, which a mode cannot make."""
    with _disable_current_modes():
        return torch.Tensor.__new__(kind)


@contextmanager
def _stream(cuda: FakeCuda, stream: Stream | None) -> Iterator[None]:
    before, cuda.current = cuda.current, cuda.current if stream is None else stream
    try:
        yield
    finally:
        cuda.current = before


class _Runtime:
    """torch.cuda.cudart()."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def cudaHostRegister(self, pointer: int, size_bytes: int, flags: int) -> IntEnum:
        return self._cuda.register(pointer, size_bytes, flags)

    def cudaHostUnregister(self, pointer: int) -> IntEnum:
        return self._cuda.unregister(pointer)


def _names_cuda(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Places(TorchFunctionMode):
    """Where tensors are made, and where they say that they are."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda, self._seen = cuda, cuda.seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._seen.own:
            return func(*args, **kwargs)
        cuda = self._cuda
        if func in _GETTERS:
            there = cuda.on_device(args[0])
            if _GETTERS[func] == "device":
                return cuda.device if there else func(*args)
            return there
        if isinstance(kwargs.get("attn_mask"), CausalBias):
            with self:  # what it is made of is to be seen
                return CausalBias._dispatch(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "is_pinned":
            found = cuda.region(args[0])
            return found is not None and found.place is not Place.DEVICE
        if name in ("to", "cpu", "cuda") and isinstance(args[0], torch.Tensor):
            return self._to(func, name, args, kwargs)
        if name == "tolist":
            return self._to_list(*args)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
            return self._make(name, partial(func, *args, **kwargs))
        if kwargs.pop("pin_memory", False):
            return self._pin(name, partial(func, *args, **kwargs))
        return func(*args, **kwargs)

    def _make(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        cuda = self._cuda
        cuda.call()
        with self._seen.not_():
            made = make()
        cuda.allocated(made)
        if name not in _EMPTY:
            cuda.compute(name, (), [made])
        return made

    def _pin(self, name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        with self._seen.not_():
            made = make()
        self._cuda.pinned(made)
        if name not in _EMPTY:
            self._cuda.host_uses(name, (), [made])
        return made

    def _to(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Across if it must; a change of dtype comes first."""
        source, *rest = args
        if rest and isinstance(rest[0], torch.Tensor):
            rest[:1] = [rest[0].device, rest[0].dtype]
            if self._cuda.on_device(args[1]):
                rest[0] = self._cuda.device
        asked = [x for x in (*rest, *kwargs.values()) if isinstance(x, (str, torch.device))]
        device = torch.device(asked[0] if asked else "cpu" if name == "cpu" else "cuda")
        if name == "to" and not asked or (device.type == "cuda") == self._cuda.on_device(source):
            others = {key: value for key, value in kwargs.items() if key != "device"}
            kept = [x for x in rest if not isinstance(x, (str, torch.device))]
            return source.to(*kept, **others) if kept or others else source
        dtypes = [x for x in (*rest, *kwargs.values()) if isinstance(x, torch.dtype)]
        source = source.to(dtypes[0]) if dtypes else source
        empty = partial(torch.empty, source.shape, dtype=source.dtype)
        target = self._make("empty", empty) if device.type == "cuda" else empty()
        return target.copy_(source, non_blocking=kwargs.get("non_blocking", False))

    def _to_list(self, tensor: torch.Tensor) -> Any:
        if self._cuda.on_device(tensor):
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        self._cuda.host_uses("tolist", [tensor], ())
        with self._seen.not_():
            return tensor.tolist()


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation on memory that CUDA knows."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cuda, self._seen = cuda, cuda.seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._seen.own and torch.is_inference_mode_enabled():
            with self:  # there, what is made of other operations comes whole
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if self._seen.own or func.is_view:
            return func(*args, **kwargs)
        with self._seen.not_():
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cuda, name = self._cuda, func._schema.name.removeprefix("aten::")
        reads, writes = _accesses(func, name, args, kwargs)
        given = [*reads, *writes]
        there = [tensor for tensor in given if cuda.on_device(tensor)]
        if not there:
            cuda.host_uses(name, reads, writes)
            return func(*args, **kwargs)
        if func is _aten.copy_.default and len({cuda.on_device(x) for x in args[:2]}) == 2:
            return self._cross(*args, **kwargs)
        if name not in _ANYWHERE and any(x.dim() and not cuda.on_device(x) for x in given):
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
        if name in _EMPTY:
            made: torch.Tensor = func(*args, **kwargs)
            cuda.allocated(made)
            return made
        access = cuda.compute(name, reads, writes)
        result = func(*args, **kwargs)
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        for output in outputs:
            if not isinstance(output, torch.Tensor):
                cuda.current.synchronize()
            elif cuda.region(output) is None and output.numel():
                cuda.allocated(output, access)
        return result

    def _cross(
        self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
    ) -> torch.Tensor:
        plain = target.is_contiguous() and source.is_contiguous()
        assert plain and target.shape == source.shape and target.dtype == source.dtype, (
            "a copy across that is more than bytes is not modelled"
        )
        self._cuda.copy(target, source, blocks=not non_blocking)
        return target


def _accesses(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What an operation reads and writes, by its schema."""
    reads, writes = list[torch.Tensor](), list[torch.Tensor]()
    for index, argument in enumerate(func._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        values = value if isinstance(value, (tuple, list)) else (value,)
        tensors = [each for each in values if isinstance(each, torch.Tensor)]
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written:
            writes += tensors
        if not written or (name.endswith("_") and name not in _WRITES_ONLY):
            reads += tensors
    return reads, writes
