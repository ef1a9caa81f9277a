"""One file from the hub into its cache: resumed where it was cut, taken only with the right hash.

Written here, because huggingface_hub throws away what it has of a file when a process ends.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import httpx2
from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not in __all__
    build_hf_headers,
    hf_raise_for_status,
)

from moestro.server.facts import HubName

from .choice import RepoFile
from .repository import Hub, HubRefused, Pause, Throttled, Unreachable, patiently, refusals

log = logging.getLogger("moestro.server")

CHUNK_BYTES = 1 << 20
CUTS_WITHOUT_GAIN = 5  # in a row
AGAIN_S = 1.0  # after a cut
ATTEMPTS = 2  # at a file whose hash is wrong
PARTIAL_CONTENT, RANGE_REFUSED = 206, 416

Grown = Callable[[int], None]  # bytes of this file that are here; may raise to stop


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


@dataclass(slots=True)
class _Growing:
    """What is here of one file, and its digest so far."""

    part: BinaryIO
    wanted: RepoFile
    done_bytes: int = 0
    digest: _Digest = field(init=False)

    def __post_init__(self) -> None:
        self.digest = _digest_of(self.wanted)

    def take_what_is_here(self, grown: Grown) -> None:
        self.part.seek(0)
        while chunk := self.part.read(CHUNK_BYTES):
            self.digest.update(chunk)
            self.done_bytes += len(chunk)
            grown(min(self.done_bytes, self.wanted.size_bytes))

    def add(self, chunk: bytes) -> None:
        self.part.write(chunk)
        self.digest.update(chunk)
        self.done_bytes += len(chunk)

    def start_again(self) -> None:
        self.part.seek(0)
        self.part.truncate()
        self.done_bytes, self.digest = 0, _digest_of(self.wanted)


def fetch_file(
    hub: Hub,
    name: HubName,
    commit: str,
    file: RepoFile,
    paths: tuple[Path, Path],
    grown: Grown,
    pause: Pause,
) -> None:
    """`paths`: where it grows, which may have its first bytes already, and where it ends up.

    Raises HubRefused, Unreachable; what is here then stays for the next start.
    """
    partial, target = paths
    for attempt in range(1, ATTEMPTS + 1):
        with partial.open("a+b") as part:
            growing = _Growing(part, file)
            growing.take_what_is_here(grown)
            if growing.done_bytes > file.size_bytes:
                growing.start_again()
            _until_whole(hub, name, commit, growing, grown, pause)
            part.flush()
            os.fsync(part.fileno())  # a whole file's name is the proof of its bytes
        if growing.digest.hexdigest() == file.blob:
            partial.replace(target)
            return
        partial.unlink()
        log.warning("%s of %s arrived damaged (try %d of %d)", file.name, name, attempt, ATTEMPTS)
    raise HubRefused(
        f"{file.name} of {name} came {ATTEMPTS} times with another hash than the hub lists"
        f" ({file.blob[:16]}…); it was deleted: see what stands between this machine and"
        f" {hub.endpoint}"
    )


def _until_whole(
    hub: Hub, name: HubName, commit: str, growing: _Growing, grown: Grown, pause: Pause
) -> None:
    """Goes on after each cut, as long as every few of them bring something."""
    cuts = 0
    while growing.done_bytes < growing.wanted.size_bytes:
        before = growing.done_bytes
        try:
            patiently(lambda: _receive(hub, name, commit, growing, grown), pause)
            if growing.done_bytes < growing.wanted.size_bytes:
                raise Unreachable(
                    f"{hub.endpoint} ends {growing.wanted.name} after {growing.done_bytes} of"
                    f" {growing.wanted.size_bytes} bytes; start again to go on from there"
                )
        except Throttled:
            raise
        except Unreachable:
            cuts = 0 if growing.done_bytes > before else cuts + 1
            if cuts >= CUTS_WITHOUT_GAIN:
                raise
            log.info("%s was cut after %d bytes, going on", growing.wanted.name, growing.done_bytes)
            pause(AGAIN_S)


def _receive(hub: Hub, name: HubName, commit: str, growing: _Growing, grown: Grown) -> None:
    """One answer of the hub, from where `growing` is; redirects are followed, without the token
    where they leave the hub.
    """
    file = growing.wanted
    url = hf_hub_url(name.repo_id, file.name, revision=commit, endpoint=hub.endpoint)
    # bytes as they are stored: a range of compressed ones would be another
    headers = {"Accept-Encoding": "identity"}
    if growing.done_bytes:
        headers["Range"] = f"bytes={growing.done_bytes}-"
    headers = build_hf_headers(token=hub.token or False, headers=headers)
    with (
        refusals(hub, name, file.name),
        get_session().stream("GET", url, headers=headers, timeout=hub.timeout_s) as answer,
    ):
        if answer.status_code == RANGE_REFUSED:
            growing.start_again()
            return
        _raise_for_status(answer)
        if growing.done_bytes and not _goes_on(answer, growing.done_bytes):
            growing.start_again()  # the whole file again
        for chunk in answer.iter_bytes():  # as they come: what is waited for is lost with a cut
            if growing.done_bytes + len(chunk) > file.size_bytes:
                raise HubRefused(
                    f"{hub.endpoint} sends more than the {file.size_bytes} bytes of {file.name}"
                    f" that it lists for {name}"
                )
            growing.add(chunk)
            grown(growing.done_bytes)


def _goes_on(answer: httpx2.Response, done_bytes: int) -> bool:
    said = answer.headers.get("Content-Range", "")
    return answer.status_code == PARTIAL_CONTENT and said.startswith(f"bytes {done_bytes}-")


def _raise_for_status(answer: httpx2.Response) -> None:
    if answer.is_error:
        answer.read()  # its words belong to the error
    hf_raise_for_status(answer)


def _digest_of(file: RepoFile) -> _Digest:
    if file.has_sha256:
        return hashlib.sha256()
    # as git names what it stores
    return hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
