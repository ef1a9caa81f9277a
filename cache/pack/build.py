"""Makes a pack, once: one process builds, others wait; all of it appears, or nothing.

Written aside (partial.py), synced, renamed. Who is stopped or killed in between loses the layer in
work: the next start goes on from there. Needs the memory of one layer (the caller's tensors) and
leaves few dirty pages behind.
"""

import logging
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch

from moestro.cache.facts import NoDiskSpace, PackInvalid, PackLayer, PackSpec, human_bytes

from .blobfile import page_memory
from .file import Pack
from .lockfile import wait_for_lock
from .partial import OnProof, Partial, disk_errors, free_disk_bytes
from .views import blob_views

_CHUNK_BYTES = 4 << 20


class PackWriter:
    """Handed to the caller's `fill`, which adds every missing layer once, in order."""

    def __init__(self, partial: Partial) -> None:
        self._partial = partial
        self._layers = partial.spec.layers

    @property
    def missing(self) -> list[int]:
        """Layers still to be added: all of them, or what an interrupted build left to do."""
        return [index for index in range(len(self._layers)) if index not in self._partial.finished]

    def add_layer(self, index: int, *kinds: Mapping[str, torch.Tensor]) -> None:
        """Writes layer `index`; each tensor is [num_experts, *shape of one expert].

        A mixed layer takes one mapping for each of its `kinds`, in their order, whose tensors have
        the experts of that kind alone, ascending. Raises ValueError when index, names, dtypes or
        shapes are not those of the spec, NoDiskSpace when the disk fills, PackUnwritable when it
        refuses otherwise.
        """
        if index not in self.missing[:1]:
            raise ValueError(f"layer {index} added; missing, in this order: {self.missing}")
        layer = self._layers[index]
        _check_tensors(layer, kinds)
        sources = dict(zip(layer.kinds, kinds, strict=True))
        rows = {layout: count() for layout in layer.kinds}
        memory = page_memory(max(_CHUNK_BYTES, layer.layout.stride_bytes))
        flat, whole, sums = torch.frombuffer(memory, dtype=torch.uint8), memoryview(memory), []
        for run in layer.runs(_CHUNK_BYTES):
            first, end = layer.offsets[run.start], layer.offsets[run.stop]
            flat[: end - first] = 0  # gaps are zeros, whatever lay there before
            for expert in run:
                layout, at = layer.layout_of(expert), layer.offsets[expert] - first
                tensors, row = sources[layout], next(rows[layout])
                for name, view in blob_views(flat, at, layout).items():
                    view.copy_(tensors[name][row])
                sums.append(zlib.crc32(whole[at : at + layout.stride_bytes]))
            self._partial.write_blobs(index, first, whole[: end - first])
        self._partial.finish_layer(index, sums)


def open_or_build(
    path: Path,
    spec: PackSpec,
    fill: Callable[[PackWriter], None],
    on_wait: Callable[[], None],
    log: logging.Logger,
    *,
    on_proof: OnProof = lambda done, total: None,
    free_bytes: Callable[[Path], int] = free_disk_bytes,
) -> Pack:
    """The pack at `path` if it is valid for `spec`; else it is built with `fill` and opened.

    While another process builds, `on_wait` is called again and again (every 0.2 s) and may raise
    to give up. What an interrupted build has finished is proved first, layer by layer, with
    `on_proof` called before each, and `fill` adds the rest. Raises NoDiskSpace (no partial file
    is left behind), PackUnwritable, PackInvalid (a pack just written does not read back),
    ReadFailed (a pack that is there, and cannot be read now), and whatever the callbacks raise
    (finished layers are kept for the next call).
    """
    why = _why_invalid(path, spec)
    if isinstance(why, Pack):  # a pack appears whole, by rename: no lock needed to use it
        return _announced(why, log)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, on_wait) as locked:
        why = _why_invalid(path, spec)
        if isinstance(why, Pack):  # built by the process that had the lock
            return _announced(why, log)
        if path.exists():
            log.warning("pack %s is %s: building it again", path, why)
        _build(Partial(path, spec, shared=locked), fill, on_proof, free_bytes, log)
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
    partial: Partial,
    fill: Callable[[PackWriter], None],
    on_proof: OnProof,
    free_bytes: Callable[[Path], int],
    log: logging.Logger,
) -> None:
    try:
        partial.open(on_proof, log)
        partial.check_room(free_bytes)
        writer, layers = PackWriter(partial), len(partial.spec.layers)
        if partial.finished:
            log.info("resuming: %d of %d layers are packed", len(partial.finished), layers)
        fill(writer)
        if writer.missing:
            raise ValueError(f"{layers - len(writer.missing)} of {layers} layers were added")
        partial.become_pack()
    except NoDiskSpace:
        partial.discard()  # what is left of the disk is not ours to keep full
        raise
    finally:
        partial.close()


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Holds `path`.lock, which stays: removing it would let two processes hold two of them.

    False where the file system has no locks.
    """
    lock = path.with_name(path.name + ".lock")
    with disk_errors(path):
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield wait_for_lock(fd, lock, on_wait)
    finally:
        os.close(fd)  # and with it the lock, also when the process is killed


def _check_tensors(layer: PackLayer, kinds: Sequence[Mapping[str, torch.Tensor]]) -> None:
    counts = Counter(map(layer.layout_of, range(layer.num_experts)))
    wanted = [
        {t.name: (t.dtype, (counts[layout], *t.shape)) for t in layout.tensors}
        for layout in layer.kinds
    ]
    given = [
        {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in kind.items()}
        for kind in kinds
    ]
    if given != wanted:
        raise ValueError(f"{layer.name}: got {given}, the spec says {wanted}")
