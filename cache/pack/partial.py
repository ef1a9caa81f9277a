"""A pack that is not whole yet: blobs in `.partial`, and in `.journal` which layers are finished.

    first line   check, sha256 of the pack's header without checksums: whose blobs these are
    then         check, number of a layer, crc32 of each of its blobs (8 hex digits each)

A check is the crc32 of the rest of its line. A layer's line is written when the layer is on the
disk, so whoever is killed loses the layer in work. A line that is torn or damaged costs its layer,
a damaged first line costs all. Knows no tensors.
"""

import errno
import hashlib
import logging
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moestro.cache.facts import (
    NoDiskSpace,
    PackInvalid,
    PackSpec,
    PackUnwritable,
    ReadFailed,
    human_bytes,
)

from .blobfile import BlobFile
from .file import (
    decode_checksums,
    encode_checksums,
    encode_header,
    header_bytes,
    layer_starts,
    prove_layer,
)

_SYNC_BYTES = 64 << 20  # dirty pages allowed to pile up: they count as memory, too
_DISK_BLOCK_BYTES = 512  # what stat counts in
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

OnProof = Callable[[int, int], None]  # (layers proved or found damaged, layers of the pack)


def free_disk_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
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


class Partial:
    """The two files. Whoever uses it holds the pack's lock, and calls `close` in the end.

    Where there is no lock they are not `shared`: under names of their own, and never resumed.
    """

    def __init__(self, path: Path, spec: PackSpec, *, shared: bool = True) -> None:
        """`path` is where the whole pack is going to be."""
        self.path = path
        self.spec = spec
        self.finished: dict[int, list[int]] = {}  # layer -> crc32 of its blobs
        own = "" if shared else f".{os.getpid()}-{secrets.token_hex(4)}"
        self._blobs = path.with_suffix(f"{own}.partial")
        self._journal = path.with_suffix(f"{own}.journal")
        self._shared = shared
        self._first = header_bytes(spec)
        self._starts = layer_starts(spec)
        self._blobs_fd = self._journal_fd = -1
        self._dirty_bytes = 0

    def open(self, on_proof: OnProof, log: logging.Logger) -> None:
        """Keeps what layers an earlier process finished, if they are whole; else begins anew.

        Every one of them is read and compared with its checksums; `on_proof` is called before each
        and may raise to give up, which changes nothing. Raises PackUnwritable, NoDiskSpace.
        """
        self.finished = self._proved(self._claimed(), on_proof, log)
        if not self.finished:
            if self._blobs.exists():
                log.info("%s is of no use here and was removed", self._blobs)
            self.discard()
        with disk_errors(self.path):
            self._blobs_fd = os.open(self._blobs, os.O_WRONLY | os.O_CREAT, 0o644)
            self._journal_fd = os.open(self._journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            # After a torn line the next one would be lost as well; an empty line is none.
            self._write_all(self._journal_fd, b"\n" if self.finished else self._owner())
            sync_folder(self.path.parent)

    def check_room(self, free_bytes: Callable[[Path], int]) -> None:
        """Raises NoDiskSpace unless what is still to be written fits beside what is there."""
        with disk_errors(self.path):
            there = os.fstat(self._blobs_fd).st_blocks * _DISK_BLOCK_BYTES
        needed = max(0, self._first + self.spec.total_bytes - there)
        free = free_bytes(self.path.parent)
        if free < needed:
            raise NoDiskSpace(
                f"the expert pack needs {human_bytes(needed)} in {self.path.parent}, "
                f"where {human_bytes(free)} are free"
            )

    def write_blobs(self, layer: int, offset_bytes: int, data: memoryview) -> None:
        """Writes at an offset from the layer's first blob. Raises NoDiskSpace, PackUnwritable."""
        with disk_errors(self.path):
            self._pwrite(self._first + self._starts[layer] + offset_bytes, data)

    def finish_layer(self, layer: int, checksums: list[int]) -> None:
        """All blobs of the layer were written: they are on the disk, and then the journal is."""
        with disk_errors(self.path):
            self._sync()
            self._write_all(self._journal_fd, _line(f"{layer} {encode_checksums(checksums)}"))
        self.finished[layer] = checksums

    def become_pack(self) -> None:
        """All layers are finished: writes the header, last of all, and gives the file its name."""
        sums = [self.finished[layer] for layer in range(len(self.spec.layers))]
        with disk_errors(self.path):
            self._pwrite(0, memoryview(encode_header(self.spec, sums)))
            os.ftruncate(self._blobs_fd, self._first + self.spec.total_bytes)
            os.fsync(self._blobs_fd)
            os.posix_fadvise(self._blobs_fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._blobs.replace(self.path)
            sync_folder(self.path.parent)
            self._journal.unlink(missing_ok=True)

    def discard(self) -> None:
        self.finished = {}
        with disk_errors(self.path):
            self._blobs.unlink(missing_ok=True)
            self._journal.unlink(missing_ok=True)

    def close(self) -> None:
        """Nothing stays of a build that has finished no layer or is not shared. Idempotent."""
        for fd in (self._blobs_fd, self._journal_fd):
            if fd >= 0:
                os.close(fd)
        opened, self._blobs_fd, self._journal_fd = self._blobs_fd >= 0, -1, -1
        if opened and not (self.finished and self._shared):
            self.discard()

    def _claimed(self) -> dict[int, list[int]]:
        """What the journal says of this spec's blobs; nothing where it is of another or damaged."""
        try:
            lines = self._journal.read_bytes().split(b"\n")
        except OSError:
            return {}
        if lines[0] != self._owner().rstrip():
            return {}
        found: dict[int, list[int]] = {}
        for line in lines[1:]:
            check, _, rest = line.partition(b" ")
            if check != b"%08x" % zlib.crc32(rest):
                continue
            try:
                layer, checksums = self._layer_of(rest)
            except ValueError:  # no line that this version writes
                continue
            found[layer] = checksums
        return found

    def _layer_of(self, line: bytes) -> tuple[int, list[int]]:
        name, _, digits = line.decode("ascii").partition(" ")
        layer, checksums = int(name), decode_checksums(digits)
        if layer not in range(len(self.spec.layers)):
            raise ValueError(f"{layer} is no layer")
        if len(checksums) != self.spec.layers[layer].num_experts:
            raise ValueError(f"{len(checksums)} checksums")
        return layer, checksums

    def _proved(
        self, claimed: dict[int, list[int]], on_proof: OnProof, log: logging.Logger
    ) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        if not claimed:
            return found
        try:
            file = BlobFile(self._blobs)
        except OSError as error:
            log.warning("the unfinished pack %s is unreadable: %s", self._blobs, error.strerror)
            return found
        try:
            for done, (layer, checksums) in enumerate(sorted(claimed.items())):
                on_proof(done, len(self.spec.layers))
                start = self._first + self._starts[layer]
                try:
                    prove_layer(file, start, self.spec.layers[layer], checksums)
                except (ReadFailed, PackInvalid) as error:
                    log.warning("layer %d is packed again, it is damaged: %s", layer, error)
                else:
                    found[layer] = checksums
        finally:
            file.close()
        return found

    def _owner(self) -> bytes:
        nothing = [[0] * layer.num_experts for layer in self.spec.layers]
        return _line(hashlib.sha256(encode_header(self.spec, nothing)).hexdigest())

    def _pwrite(self, offset_bytes: int, data: memoryview) -> None:
        while data:
            done = os.pwrite(self._blobs_fd, data, offset_bytes)
            offset_bytes, data = offset_bytes + done, data[done:]
            self._dirty_bytes += done
        if self._dirty_bytes >= _SYNC_BYTES:
            self._sync()

    def _sync(self) -> None:
        os.fdatasync(self._blobs_fd)
        os.posix_fadvise(self._blobs_fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._dirty_bytes = 0

    @staticmethod
    def _write_all(fd: int, data: bytes) -> None:
        while data:
            data = data[os.write(fd, data) :]
        os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """What was created or renamed in it survives a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _line(text: str) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text.encode()), text.encode())
