"""Makes a pack, once: one process builds, others wait; all of it appears, or nothing.

Written aside (`.partial`), synced, renamed. Needs the memory of one layer (the caller's tensors)
and leaves few dirty pages behind.
"""

import errno
import fcntl
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from .blobfile import page_memory
from .errors import NoDiskSpace, PackInvalid, PackUnwritable
from .layout import PackLayer, PackSpec
from .pack import Pack, encode_header, header_bytes, layer_starts
from .slots import blob_views
from .units import human_bytes

_LOCK_POLL_S = 0.2
_CHUNK_BYTES = 4 << 20
_SYNC_BYTES = 64 << 20  # dirty pages allowed to pile up: they count as memory, too
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def free_disk_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


class PackWriter:
    """Handed to the caller's `fill`, which adds every layer once, in order."""

    def __init__(self, fd: int, path: Path, spec: PackSpec) -> None:
        self._fd = fd
        self._path = path
        self._spec = spec
        self._first = header_bytes(spec)
        self._starts = layer_starts(spec)
        self._checksums: list[list[int]] = []
        self._dirty_bytes = 0

    def add_layer(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes layer `index`; each tensor is [num_experts, *shape of one expert].

        Raises ValueError when index, names, dtypes or shapes are not those of the spec,
        NoDiskSpace when the disk fills, PackUnwritable when it refuses otherwise.
        """
        if index != len(self._checksums):
            raise ValueError(f"layer {index} added, layer {len(self._checksums)} is next")
        layer = self._spec.layers[index]
        _check_tensors(layer, tensors)
        stride = layer.layout.stride_bytes
        rows = max(1, min(layer.num_experts, _CHUNK_BYTES // stride))
        memory = page_memory(rows * stride)
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        views = [blob_views(flat, row * stride, layer.layout) for row in range(rows)]
        whole, sums = memoryview(memory), list[int]()
        for first in range(0, layer.num_experts, rows):
            count = min(rows, layer.num_experts - first)
            for row in range(count):
                for name, view in views[row].items():
                    view.copy_(tensors[name][first + row])
                sums.append(zlib.crc32(whole[row * stride : (row + 1) * stride]))
            self._write(self._first + self._starts[index] + first * stride, whole[: count * stride])
        self._checksums.append(sums)

    def commit(self) -> None:
        """Writes the header last, and sees that all of it is on the disk."""
        if len(self._checksums) != len(self._spec.layers):
            raise ValueError(
                f"{len(self._checksums)} of {len(self._spec.layers)} layers were added"
            )
        self._write(0, memoryview(encode_header(self._spec, self._checksums)))
        with _disk_errors(self._path):
            os.fsync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _write(self, offset_bytes: int, data: memoryview) -> None:
        with _disk_errors(self._path):
            while data:
                done = os.pwrite(self._fd, data, offset_bytes)
                offset_bytes, data = offset_bytes + done, data[done:]
                self._dirty_bytes += done
            if self._dirty_bytes >= _SYNC_BYTES:
                os.fdatasync(self._fd)
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
                self._dirty_bytes = 0


def open_or_build(
    path: Path,
    spec: PackSpec,
    fill: Callable[[PackWriter], None],
    on_wait: Callable[[], None],
    log: logging.Logger,
    *,
    free_bytes: Callable[[Path], int] = free_disk_bytes,
) -> Pack:
    """The pack at `path` if it is valid for `spec`; else it is built with `fill` and opened.

    While another process builds, `on_wait` is called again and again (every 0.2 s) and may raise
    to give up. Raises NoDiskSpace, PackUnwritable, PackInvalid (a pack just written does not read
    back), and whatever `fill` and `on_wait` raise; no partial file is left behind.
    """
    why = _why_invalid(path, spec)
    if isinstance(why, Pack):  # a pack appears whole, by rename: no lock needed to use it
        return _announced(why, log)
    with _disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, on_wait):
        why = _why_invalid(path, spec)
        if isinstance(why, Pack):  # built by the process that had the lock
            return _announced(why, log)
        if path.exists():
            log.warning("pack %s is %s: building it again", path, why)
        _build(path, spec, fill, free_bytes)
        return _announced(Pack.open(path, spec), log)


def _why_invalid(path: Path, spec: PackSpec) -> Pack | PackInvalid:
    try:
        return Pack.open(path, spec)
    except PackInvalid as error:
        return error


def _announced(pack: Pack, log: logging.Logger) -> Pack:
    log.info(
        "pack %s: %d experts, %s, read %s",
        pack.path,
        pack.spec.num_experts,
        human_bytes(pack.file.size_bytes),
        "directly" if pack.direct else "buffered (this file system has no O_DIRECT)",
    )
    return pack


def _build(
    path: Path,
    spec: PackSpec,
    fill: Callable[[PackWriter], None],
    free_bytes: Callable[[Path], int],
) -> None:
    partial = path.with_suffix(".partial")
    with _disk_errors(path):
        partial.unlink(missing_ok=True)  # of a process that was killed
        needed, free = header_bytes(spec) + spec.total_bytes, free_bytes(path.parent)
        if free < needed:
            raise NoDiskSpace(
                f"the expert pack needs {human_bytes(needed)} in {path.parent}, "
                f"where {human_bytes(free)} are free"
            )
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        writer = PackWriter(fd, path, spec)
        fill(writer)
        writer.commit()
        with _disk_errors(path):
            partial.replace(path)
            _sync_folder(path.parent)
    finally:
        os.close(fd)
        partial.unlink(missing_ok=True)  # gone already when it was renamed


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds `path`.lock, which stays: removing it would let two processes hold two of them."""
    with _disk_errors(path):
        fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _try_lock(fd):
            on_wait()
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)  # and with it the lock, also when the process is killed


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turns what the file system says into this room's errors, naming the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise NoDiskSpace(
                f"the disk filled up while the expert pack was written to {path.parent} "
                f"({human_bytes(free_disk_bytes(path.parent))} are free)"
            ) from error
        raise PackUnwritable(f"cannot write {path}: {error.strerror}") from error


def _check_tensors(layer: PackLayer, tensors: Mapping[str, torch.Tensor]) -> None:
    wanted = {t.name: (t.dtype, (layer.num_experts, *t.shape)) for t in layer.layout.tensors}
    given = {
        name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()
    }
    if given != wanted:
        raise ValueError(f"{layer.name}: got {given}, the spec says {wanted}")
