import threading
from pathlib import Path

import pytest

from moestro.engine import Progress
from moestro.factorize import FactorizeError
from moestro.factorize.facts.storage import (
    STAGING_PREFIX,
    disk_errors,
    exclusive,
    publish,
    require_free,
    staged,
    sweep,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with staged(tmp_path / "target") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "target").exists()
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "a").read_text() == "1"


def test_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "target") as folder:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_an_older_one_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(ValueError), staged(target):
        raise ValueError
    assert names(target) == ["old"]
    with staged(target) as folder:
        (folder / "new").write_text("2")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["target"]


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    left = tmp_path / f"{STAGING_PREFIX}dead"
    left.mkdir()
    (left / "half").write_text("x")
    (tmp_path / "model").mkdir()
    sweep(tmp_path)
    assert names(tmp_path) == ["model"]


def test_too_little_room_says_the_sums(tmp_path: Path) -> None:
    require_free(tmp_path, 10, "it", free=lambda _: 10)
    with pytest.raises(FactorizeError, match=r"the model needs 12 MB .* which has 5 MB"):
        require_free(tmp_path, 12_000_000, "the model", free=lambda _: 5_000_000)


def test_what_the_disk_refuses_is_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(FactorizeError, match="No space left on device"),
        disk_errors(tmp_path),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_folder_is_published_once(tmp_path: Path) -> None:
    """Who comes second keeps what is whole, and replaces what is not."""
    target = tmp_path / "target"

    def is_whole(folder: Path) -> bool:
        return (folder / "whole").exists()

    for number, name in enumerate(("half", "whole", "whole")):
        new = tmp_path / f"own-{number}" / "new"
        new.mkdir(parents=True)
        (new / name).write_text(str(number))
        publish(new, target, is_whole)
    assert names(target) == ["whole"]
    assert (target / "whole").read_text() == "1"


def test_a_folder_that_comes_back_again_and_again_is_given_up(tmp_path: Path) -> None:
    target, new = tmp_path / "target", tmp_path / "own" / "new"
    new.mkdir(parents=True)

    class Busy(type(tmp_path)):  # type: ignore[misc]  # the platform's own Path
        """Somebody else fills it as soon as it is moved away."""

        def rename(self, to: object) -> object:
            moved = super().rename(to)
            (tmp_path / "target" / "half").mkdir(parents=True)
            return moved

    (target / "half").mkdir(parents=True)
    with pytest.raises(FactorizeError, match="again and again"):
        publish(new, Busy(target), lambda _: False)


def test_the_second_start_waits_and_says_so(tmp_path: Path) -> None:
    said = threading.Event()
    notices: list[Progress] = []
    order: list[str] = []

    def progress(notice: Progress) -> None:
        notices.append(notice)
        said.set()

    def second() -> None:
        with exclusive(tmp_path / ".lock", progress):
            order.append("second")

    with exclusive(tmp_path / ".lock", progress):
        assert notices == []
        thread = threading.Thread(target=second)
        thread.start()
        assert said.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert notices[0].phase == "waiting for another start"


def test_waiting_can_be_stopped(tmp_path: Path) -> None:
    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with (
        exclusive(tmp_path / ".lock", stop),
        pytest.raises(KeyboardInterrupt),
        exclusive(tmp_path / ".lock", stop),
    ):
        raise AssertionError("unreachable")
