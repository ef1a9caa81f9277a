"""Asks the hub what a repository has, and turns what goes wrong there into one line each."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from moestro.engine import StartError
from moestro.server.facts import HubName

from .choice import RepoFile

log = logging.getLogger("moestro.server")

MOST_WAITS = 5
MOST_WAIT_S = 600.0  # longer ones are refused with the number
USUAL_WAIT_S = 10.0  # where a hub that is busy does not say
_RESET = re.compile(r"\bt=(\d+)")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
TOO_MANY, UNAUTHORIZED, FORBIDDEN, SERVER_FAULTS = 429, 401, 403, 500

Answer = TypeVar("Answer")
Pause = Callable[[float], None]  # waits so many seconds; may raise to stop a start


class HubRefused(StartError):
    """The model cannot be had from the hub; one line with the cause and the next step."""


class Unreachable(HubRefused):
    """Nobody answers there now: what is in the cache may serve."""


class Throttled(Unreachable):
    """It answers, and wants no more requests for longer than a start waits."""


class Busy(Exception):
    """The hub asks to come back later."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"busy for {wait_s:g} s")
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Hub:
    """Where models come from (`endpoint`, no slash at its end) and are kept (`cache_dir`)."""

    endpoint: str
    cache_dir: Path
    token: str | None = None
    offline: bool = False
    timeout_s: float = 10.0

    @classmethod
    def of_environment(cls) -> "Hub":
        """As huggingface_hub has read it: HF_ENDPOINT, HF_HOME or HF_HUB_CACHE, HF_TOKEN or the
        token of `hf auth login`, HF_HUB_OFFLINE, HF_HUB_DOWNLOAD_TIMEOUT.
        """
        return cls(
            constants.ENDPOINT,
            Path(constants.HF_HUB_CACHE),
            get_token(),
            is_offline_mode(),
            float(constants.HF_HUB_DOWNLOAD_TIMEOUT),
        )


@dataclass(frozen=True, slots=True)
class Listing:
    commit: str
    files: tuple[RepoFile, ...]


def list_repository(hub: Hub, name: HubName, pause: Pause) -> Listing:
    """Commit and files of `name` now. Raises HubRefused, Unreachable."""
    if hub.offline:
        raise Unreachable("HF_HUB_OFFLINE is set; unset it to ask the hub")
    api = HfApi(endpoint=hub.endpoint, token=hub.token if hub.token is not None else False)

    def ask() -> Listing:
        with refusals(hub, name, "the list of files"):
            info = api.model_info(
                name.repo_id, revision=name.revision, files_metadata=True, timeout=hub.timeout_s
            )
        files = []
        for file in info.siblings or ():
            blob = file.lfs.sha256 if file.lfs is not None else file.blob_id
            size_bytes = file.lfs.size if file.lfs is not None else file.size
            files.append(RepoFile(file.rfilename, size_bytes or 0, _checked(blob, hub, name)))
        return Listing(_checked(info.sha, hub, name), tuple(files))

    return patiently(ask, pause)


def patiently(ask: Callable[[], Answer], pause: Pause) -> Answer:
    """Asks again after the wait that a busy hub names. Raises Throttled after the last try."""
    for _ in range(MOST_WAITS):
        try:
            return ask()
        except Busy as busy:
            if busy.wait_s > MOST_WAIT_S:
                raise Throttled(
                    f"the hub takes no more requests for {busy.wait_s:.0f} s (429); start again"
                    " then, or set HF_TOKEN: it lets an account ask more often"
                ) from busy
            log.info("the hub takes no more requests now (429): waiting %.0f s", busy.wait_s)
            pause(busy.wait_s)
    raise Throttled(
        f"the hub took no request at {MOST_WAITS} tries (429); start again later, or set HF_TOKEN:"
        " it lets an account ask more often"
    )


@contextmanager
def refusals(hub: Hub, name: HubName, what: str) -> Iterator[None]:
    """The one place that turns the hub's errors into ours: HubRefused, Unreachable, Busy."""
    try:
        yield
    except HfHubHTTPError as error:
        _refuse(hub, name, what, error)
    except OfflineModeIsEnabled:
        raise Unreachable("HF_HUB_OFFLINE is set; unset it to ask the hub") from None
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise HubRefused(f"HF_ENDPOINT {hub.endpoint!r} is no address: {error}") from error
    except httpx2.RequestError as error:
        raise Unreachable(
            f"no answer from {hub.endpoint} ({_words(error)}); check the connection, or HF_ENDPOINT"
        ) from error
    except (ValueError, TypeError, KeyError) as error:  # of an answer that is no JSON, or another
        raise HubRefused(
            f"{hub.endpoint} does not answer as a hub does ({_words(error)}); check HF_ENDPOINT"
        ) from error


def _refuse(hub: Hub, name: HubName, what: str, error: HfHubHTTPError) -> NoReturn:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        has = "the token that is set has no access" if hub.token else "no token is set"
        raise HubRefused(
            f"{name.repo_id} is gated and {has}: accept its terms at"
            f" {hub.endpoint}/{name.repo_id} and set HF_TOKEN to a token of that account"
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise HubRefused(
            f"{name.repo_id} has no revision {name.revision!r}; see"
            f" {hub.endpoint}/{name.repo_id}/tree/main for its branches and tags"
        ) from error
    unknown = status == UNAUTHORIZED and not hub.token  # a hub hides private ones so
    if unknown or isinstance(error, RepositoryNotFoundError):
        raise HubRefused(
            f"{name.repo_id} is no folder here, and {hub.endpoint} has no model of that name that"
            f" {'this token' if hub.token else 'anybody'} may read (private ones need HF_TOKEN);"
            " a folder of this machine is told by ./ in front"
        ) from error
    if isinstance(error, RemoteEntryNotFoundError):
        raise HubRefused(f"{name}: {what} is gone from the hub; start again") from error
    if status in (UNAUTHORIZED, FORBIDDEN):
        raise HubRefused(
            f"{hub.endpoint} refuses {name} to {'the token that is set' if hub.token else 'all'}"
            f" ({status}); set HF_TOKEN to a valid one that may read {hub.endpoint}/{name.repo_id}"
        ) from error
    if status == TOO_MANY:
        raise Busy(_wait_s(error.response.headers)) from error
    if status >= SERVER_FAULTS:
        raise Unreachable(f"{hub.endpoint} answers {status} for {what}; try again later") from error
    raise HubRefused(f"{hub.endpoint} answers {status} for {what} of {name}") from error


def _wait_s(headers: httpx2.Headers) -> float:
    """In seconds of Retry-After, else of RateLimit (`"api";r=0;t=55`).

    A date is not worth the clocks that it would be compared with.
    """
    text = headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    reset = _RESET.search(headers.get("RateLimit", ""))
    return float(reset[1]) if reset else USUAL_WAIT_S


def _checked(digest: str | None, hub: Hub, name: HubName) -> str:
    """It becomes a file's name."""
    if digest is None or not _HASH.fullmatch(digest):
        raise HubRefused(f"{hub.endpoint} lists {name} with {digest!r} for a hash")
    return digest


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def sleeping(look: Callable[[], None], beat_s: float = 0.2) -> Pause:
    """A pause during which `look` is called now and then; what it raises ends it."""

    def pause(seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            look()
            time.sleep(min(beat_s, left_s))

    return pause
