"""Models from a small hub on loopback: what is asked for, and what each fault becomes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download

from fake_hub import COMMIT, FakeHub, Fault, blob_of, fake_hub
from moestro.engine import LoadCancelled, ModelRefused, Progress
from moestro.server.facts import HubName
from moestro.server.hub import Hub, HubRefused, fetch_for_plan, fetch_model

NAME = HubName("org/tiny", None)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WEIGHT_BYTES = 200_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The files of a repository. Nothing here reads them as a model."""
    folder = tmp_path / "source"
    (folder / "original").mkdir(parents=True)
    texts = ("config.json", "tokenizer.json", "README.md", "original/config.json")
    for name in texts:
        (folder / name).write_text(json.dumps({"of": name}), "utf-8")
    for number, name in enumerate((*SHARDS, "consolidated.safetensors")):
        (folder / name).write_bytes(bytes([number, 1, 2, 3]) * (WEIGHT_BYTES // 4))
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


@pytest.fixture
def server(source: Path) -> Iterator[FakeHub]:
    with fake_hub({"org/tiny": source}) as running:
        yield running


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    return Hub(server.endpoint, tmp_path / "hub")


Fetch = Callable[..., Path]


class Pauses(list[float]):
    """Remembers how long it was asked to wait, and does not."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def silent(_: Progress) -> None:
    pass


def fetched(hub: Hub, name: HubName = NAME, pauses: Pauses | None = None) -> Path:
    return fetch_model(name, silent, hub, pause=Pauses() if pauses is None else pauses)


def refusal(hub: Hub, name: HubName = NAME) -> str:
    with pytest.raises(HubRefused) as refused:
        fetched(hub, name)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def partials(hub: Hub) -> list[int]:
    return [path.stat().st_size for path in hub.cache_dir.rglob("*.moestro-partial")]


NEEDED = {"config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS}


def test_only_what_is_needed_comes_into_the_hubs_own_layout(
    server: FakeHub, hub: Hub, source: Path
) -> None:
    folder = fetched(hub)
    assert folder == hub.cache_dir / "models--org--tiny" / "snapshots" / COMMIT
    assert {path.name for path in folder.iterdir()} == NEEDED == set(server.fetched())
    for path in folder.iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()
        assert path.resolve() == folder.parent.parent / "blobs" / blob_of(source / path.name)
    assert (folder.parent.parent / "refs" / "main").read_text("utf-8") == COMMIT
    assert partials(hub) == []


def test_what_is_here_is_not_fetched_again(server: FakeHub, hub: Hub) -> None:
    folder = fetched(hub)
    server.asked.clear()
    assert fetched(hub) == folder
    assert server.fetched() == []
    (folder / SHARDS[1]).resolve().unlink()
    assert fetched(hub) == folder
    assert server.fetched() == [SHARDS[1]]


def test_a_plan_takes_config_and_index_alone(server: FakeHub, hub: Hub) -> None:
    found = fetch_for_plan(NAME, silent, hub)
    assert found.weight_bytes is None  # the index says it
    assert set(server.fetched()) == {"config.json", "model.safetensors.index.json"}


def test_a_plan_without_an_index_has_the_size_of_the_file(
    server: FakeHub, hub: Hub, source: Path
) -> None:
    for name in (SHARDS[1], "consolidated.safetensors", "model.safetensors.index.json"):
        (source / name).unlink()
    (source / SHARDS[0]).rename(source / "model.safetensors")
    assert fetch_for_plan(NAME, silent, hub).weight_bytes == WEIGHT_BYTES
    assert server.fetched() == ["config.json"]


def test_a_revision_is_asked_for_and_remembered(server: FakeHub, hub: Hub) -> None:
    folder = fetched(hub, HubName("org/tiny", "v1"))
    assert (folder.parent.parent / "refs" / "v1").read_text("utf-8") == COMMIT
    assert server.asked[0].path == "/api/models/org/tiny/revision/v1"


def test_progress_is_of_all_files_together(hub: Hub) -> None:
    seen: list[Progress] = []
    fetch_model(NAME, seen.append, hub)
    counted = [notice for notice in seen if notice.total]
    whole = counted[-1].total
    assert {(notice.phase, notice.unit, notice.total) for notice in counted} == {
        ("download", "bytes", whole)
    }
    done = [notice.done for notice in counted]
    assert done == sorted(done) and done[-1] == whole > 2 * WEIGHT_BYTES


def test_a_cut_transfer_goes_on_where_it_was(server: FakeHub, hub: Hub) -> None:
    server.faults.append(Fault("/stored/", cut_after_bytes=70_000))
    pauses = Pauses()
    fetched(hub, pauses=pauses)
    ranges = [one.range for one in server.asked if "/stored/" in one.path]
    assert ranges == [None, "bytes=70000-", None]
    assert len(pauses) == 1


def test_a_stopped_start_leaves_what_the_next_one_goes_on_from(server: FakeHub, hub: Hub) -> None:
    def stop(notice: Progress) -> None:
        if notice.done > 100_000:
            raise LoadCancelled("the start was stopped")

    with pytest.raises(LoadCancelled):
        fetch_model(NAME, stop, hub)
    [kept_bytes] = partials(hub)
    assert kept_bytes > 50_000
    server.asked.clear()
    fetched(hub)
    ranges = [one.range for one in server.asked if "/stored/" in one.path]
    assert ranges == [f"bytes={kept_bytes}-" if kept_bytes < WEIGHT_BYTES else None, None]


def test_a_server_that_knows_no_ranges_sends_it_all_again(server: FakeHub, hub: Hub) -> None:
    server.faults.append(Fault("/stored/", cut_after_bytes=70_000))
    server.faults.append(Fault("/stored/", ignores_range=True))
    fetched(hub)
    assert partials(hub) == []


def test_cuts_that_bring_nothing_end(server: FakeHub, hub: Hub) -> None:
    server.faults.append(Fault("/stored/", cut_after_bytes=0, times=99))
    assert "no answer from" in refusal(hub)


def test_a_wrong_hash_is_fetched_once_more(server: FakeHub, hub: Hub, source: Path) -> None:
    server.faults.append(Fault("/stored/", flips_a_bit=True))
    folder = fetched(hub)
    assert (folder / SHARDS[0]).read_bytes() == (source / SHARDS[0]).read_bytes()


@pytest.mark.parametrize("part", ["/stored/", "/tokenizer.json"])
def test_a_hash_that_stays_wrong_is_refused(server: FakeHub, hub: Hub, part: str) -> None:
    server.faults.append(Fault(part, flips_a_bit=True, times=2))
    assert "with another hash than the hub lists" in refusal(hub)
    assert partials(hub) == []
    assert not (hub.cache_dir / "models--org--tiny" / "refs").exists()


def test_a_damaged_rest_of_an_earlier_start_is_found(hub: Hub, source: Path) -> None:
    fetched(hub)
    blob = hub.cache_dir / "models--org--tiny" / "blobs" / blob_of(source / SHARDS[0])
    blob.unlink()
    blob.with_name(f"{blob.name}.moestro-partial").write_bytes(b"not the first bytes")
    assert (fetched(hub) / SHARDS[0]).read_bytes() == (source / SHARDS[0]).read_bytes()


def test_a_busy_hub_is_waited_for(server: FakeHub, hub: Hub) -> None:
    server.faults.append(Fault("/api/", 429, {"Retry-After": "7"}))
    server.faults.append(Fault("/stored/", 429, {"RateLimit": '"resolvers";r=0;t=3'}))
    server.faults.append(Fault("/stored/", 429, {"Retry-After": "Mon, 01 Jan 2035 00:00:00 GMT"}))
    pauses = Pauses()
    fetched(hub, pauses=pauses)
    assert pauses == [7.0, 3.0, 10.0]


def test_a_busy_hub_is_not_waited_for_without_end(server: FakeHub, hub: Hub) -> None:
    server.faults.append(Fault("/api/", 429, {"Retry-After": "86400"}))
    assert "no more requests for 86400 s (429)" in refusal(hub)
    server.faults.append(Fault("/api/", 429, {"Retry-After": "1"}, times=99))
    assert "HF_TOKEN" in refusal(hub)
    server.faults[-1].times = 0
    server.faults.append(Fault("/stored/", 429, {"Retry-After": "86400"}, times=99))
    server.asked.clear()
    assert "no more requests for 86400 s (429)" in refusal(hub)
    assert len([one for one in server.asked if "/stored/" in one.path]) == 1


def test_a_renamed_repository_is_followed(server: FakeHub, hub: Hub) -> None:
    place = {"Location": f"{server.endpoint}/api/models/org/tiny"}
    server.faults.append(Fault("/api/models/org/old", 307, place))
    server.repositories["org/old"] = server.repositories["org/tiny"]
    assert fetched(hub, HubName("org/old", None)).is_dir()


def test_a_gated_model_wants_a_token(server: FakeHub, hub: Hub) -> None:
    server.gate = "right"
    said = refusal(hub)
    assert "gated and no token is set" in said
    assert f"{hub.endpoint}/org/tiny" in said and "HF_TOKEN" in said
    wrong = Hub(hub.endpoint, hub.cache_dir, token="wrong")
    assert "the token that is set has no access" in refusal(wrong)
    server.asked.clear()
    fetched(Hub(hub.endpoint, hub.cache_dir, token="right"))
    tokens = {("/stored/" in one.path, one.token) for one in server.asked}
    assert tokens == {(False, "Bearer right"), (True, None)}  # not to the storage's host


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("/api/", 401), "no model of that name that anybody may read"),
        (Fault("/api/", 403, {"X-Error-Code": "GatedRepo"}), "is gated"),
        (Fault("/api/", 403), "refuses org/tiny to all (403)"),
        (Fault("/stored/", 403), "HF_TOKEN"),
        (Fault("/api/", 503), "answers 503"),
        (Fault("/api/", 418), "answers 418"),
        (Fault("/api/", 200), "does not answer as a hub does"),
    ],
)
def test_other_answers_are_one_line_each(
    server: FakeHub, hub: Hub, fault: Fault, said: str
) -> None:
    fault.times = 99
    server.faults.append(fault)
    assert said in refusal(hub)


def test_names_and_revisions_that_do_not_exist(hub: Hub) -> None:
    said = refusal(hub, HubName("org/none", None))
    assert "org/none is no folder here" in said and "no model of that name" in said
    assert "has no revision 'v9'" in refusal(hub, HubName("org/tiny", "v9"))


def test_a_repository_without_weights_says_what_it_has(hub: Hub, source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    assert "no .safetensors files; it has 3 .json, 1 .md, 1 .bin" in refusal(hub)


@pytest.mark.parametrize("name", ["../outside", "deep/file", 3, ""])
def test_an_index_names_files_of_its_own_folder(hub: Hub, source: Path, name: object) -> None:
    index = {"weight_map": {"a": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert "is not a weight index" in refusal(hub)


def test_a_full_disk_is_told_before_the_weights(server: FakeHub, hub: Hub) -> None:
    with pytest.raises(HubRefused, match="needs 0.4 MiB more .* 0.1 MiB free; make room"):
        fetch_model(NAME, silent, hub, free=lambda _: 100_000)
    assert not set(server.fetched()) & set(SHARDS)


def test_what_the_config_says_is_asked_before_the_weights(server: FakeHub, hub: Hub) -> None:
    seen: list[set[str]] = []

    def refuse(folder: Path) -> None:
        seen.append({path.name for path in folder.iterdir()})
        raise ModelRefused("dense")

    with pytest.raises(ModelRefused, match="dense"):
        fetch_model(NAME, silent, hub, check=refuse)
    assert seen == [{"config.json", "model.safetensors.index.json"}]
    assert not set(server.fetched()) & set(SHARDS)
    fetched(hub)
    assert fetch_model(NAME, silent, hub, check=refuse).is_dir()  # the start itself will say it


@pytest.mark.parametrize(("free_bytes", "warns"), [(10**9, False), (500_000, True)])
def test_a_pack_that_may_not_fit_is_warned_of(
    free_bytes: int, warns: bool, hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "moestro"):
        fetch_model(NAME, silent, hub, pack_dir=tmp_path / "packs", free=lambda _: free_bytes)
    assert ("the pack of its experts takes up to 0.4 MiB" in caplog.text) is warns


def test_what_has_arrived_needs_no_room_again(hub: Hub, source: Path) -> None:
    fetched(hub)
    assert fetch_model(NAME, silent, hub, free=lambda _: 0).is_dir()
    blob = hub.cache_dir / "models--org--tiny" / "blobs" / blob_of(source / SHARDS[0])
    blob.rename(blob.with_name(f"{blob.name}.moestro-partial"))
    assert fetch_model(NAME, silent, hub, free=lambda _: 0).is_dir()


def offline(hub: Hub) -> Hub:
    return Hub(hub.endpoint, hub.cache_dir, offline=True)


def test_offline_a_whole_snapshot_serves(server: FakeHub, hub: Hub) -> None:
    folder = fetched(hub)
    server.asked.clear()
    assert fetched(offline(hub)) == folder == fetched(offline(hub), HubName("org/tiny", COMMIT))
    assert fetch_for_plan(NAME, silent, offline(hub)).folder == folder
    assert server.asked == []


def test_offline_what_lacks_is_named(hub: Hub) -> None:
    said = refusal(offline(hub))
    assert "org/tiny is not in" in said and "HF_HUB_OFFLINE is set" in said
    fetch_for_plan(NAME, silent, hub)
    assert f"lacks {SHARDS[0]}" in refusal(offline(hub))


def test_a_hub_that_is_gone_is_like_no_connection(server: FakeHub, hub: Hub) -> None:
    folder = fetched(hub)
    server.stop()
    assert fetched(hub) == folder
    shutil.rmtree(folder)
    said = refusal(hub)
    assert "is not in" in said and "no answer from" in said and "HF_ENDPOINT" in said


def test_an_address_that_is_none(tmp_path: Path) -> None:
    assert "HF_ENDPOINT" in refusal(Hub("nowhere", tmp_path / "hub"))


def test_a_cache_that_is_a_file(server: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("", "utf-8")
    assert "HF_HOME" in refusal(Hub(server.endpoint, tmp_path / "hub"))


def test_the_hubs_own_library_finds_what_was_fetched(server: FakeHub, hub: Hub) -> None:
    folder = fetched(hub)
    for revision in (None, COMMIT):
        found = hf_hub_download(
            "org/tiny",
            SHARDS[0],
            revision=revision,
            cache_dir=hub.cache_dir,
            endpoint=hub.endpoint,
            local_files_only=True,
        )
        assert Path(found) == folder / SHARDS[0]


def test_what_the_hubs_own_library_fetched_is_not_fetched_again(server: FakeHub, hub: Hub) -> None:
    found = snapshot_download(
        "org/tiny", cache_dir=hub.cache_dir, endpoint=hub.endpoint, token=False
    )
    server.asked.clear()
    assert fetched(hub) == Path(found)
    assert server.fetched() == []
