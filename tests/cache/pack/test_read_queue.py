import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moestro.cache.pack import ReadQueue, page_memory

PAGE = 4096
PAGES = 32


@pytest.fixture
def queue() -> Iterator[ReadQueue]:
    try:
        queue = ReadQueue(8)
    except OSError as error:
        pytest.skip(f"no queue of the kernel's here: {error}")
    yield queue
    queue.close()
    queue.close()


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def descriptor(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[int]:
    path = tmp_path / "numbered"
    path.write_bytes(b"".join(bytes([page]) * PAGE for page in range(PAGES)))
    try:
        found = os.open(path, os.O_RDONLY | (os.O_DIRECT if request.param else 0))
    except OSError:
        pytest.skip("no direct reads on this file system")
    yield found
    os.close(found)


def memory(pages: int) -> memoryview:
    return memoryview(page_memory(pages * PAGE))


def finish(queue: ReadQueue, count: int) -> dict[int, int]:
    ended: list[tuple[int, int]] = []
    while len(ended) < count:
        ended += queue.ended(1)
    assert queue.under_way == 0
    return dict(ended)


def test_every_read_fills_its_buffers_in_order(queue: ReadQueue, descriptor: int) -> None:
    buffers = {place: [memory(1), memory(2)] for place in (5, 0, 7)}
    queue.begin(descriptor, [(place, 4 * place * PAGE, buffers[place]) for place in buffers])
    assert finish(queue, 3) == dict.fromkeys(buffers, 3 * PAGE)
    for place, (one, two) in buffers.items():
        assert set(one) == {4 * place}
        assert [two[0], two[-1]] == [4 * place + 1, 4 * place + 2]


def test_places_are_used_again(queue: ReadQueue, descriptor: int) -> None:
    for page in range(PAGES):
        into = memory(1)
        queue.begin(descriptor, [(3, page * PAGE, [into])])
        assert finish(queue, 1) == {3: PAGE}
        assert set(into) == {page}


def test_the_end_of_the_file_is_said_in_bytes(queue: ReadQueue, descriptor: int) -> None:
    queue.begin(descriptor, [(0, (PAGES - 1) * PAGE, [memory(2)]), (1, PAGES * PAGE, [memory(1)])])
    assert finish(queue, 2) == {0: PAGE, 1: 0}


def test_a_closed_descriptor_is_refused(queue: ReadQueue, descriptor: int) -> None:
    gone = os.dup(descriptor)
    os.close(gone)
    with pytest.raises(OSError, match="Bad file descriptor") as caught:
        queue.begin(gone, [(0, 0, [memory(1)])])
    assert caught.value.errno == errno.EBADF
    assert queue.under_way == 0
    assert queue.ended() == []


def test_nobody_waits_longer_than_told_or_for_nothing(queue: ReadQueue, descriptor: int) -> None:
    assert queue.ended(1, 10.0) == [], "nothing is under way: nothing to wait for"
    queue.begin(descriptor, [(2, 0, [memory(1)])])
    while not (ended := queue.ended(1, 1e-6)):
        pass
    assert ended == [(2, PAGE)]


def test_closing_waits_for_what_is_under_way(queue: ReadQueue, descriptor: int) -> None:
    into = memory(8)
    queue.begin(descriptor, [(0, 0, [into])])
    queue.close()
    assert [into[page * PAGE] for page in range(8)] == list(range(8))


def test_another_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "vax")
    with pytest.raises(OSError) as caught:
        ReadQueue(1)
    assert caught.value.errno == errno.ENOSYS
