"""A real process and real clients: a tiny model, so that it takes seconds."""

import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import tiny
from exposition import samples
from server_process import ServerProcess, serving

SLOTS = 6 * 48 * 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("process") / "tiny-mixtral")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    flags = ("--host-memory", str(SLOTS), "--kv-memory", "1MiB", "--threads", "1")
    with serving(model, *flags, "--cache-dir", str(model.parent / "cache")) as running:
        yield running


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_streamed_and_plain_text_are_the_same(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny-mixtral", "prompt": "Hello", "max_tokens": 24, "seed": 3}
    plain = client.completions.create(**fields, temperature=1.0)
    chunks = list(
        client.completions.create(
            **fields, temperature=1.0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == plain.choices[0].text
    assert plain.usage is not None
    assert chunks[-1].usage is not None and chunks[-1].usage == plain.usage
    assert plain.usage.prompt_tokens == 5
    assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens


def test_four_streams_at_once_equal_one_at_a_time(client: openai.OpenAI) -> None:
    def text(prompt: str) -> str:
        stream = client.completions.create(
            model="tiny-mixtral", prompt=prompt, max_tokens=24, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    prompts = ["one", "two three", "four", "a longer prompt than the others"]
    alone = [text(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(text, prompts)) == alone


def test_a_request_without_model_is_served_and_an_unknown_one_is_not(
    server: ServerProcess, client: openai.OpenAI
) -> None:
    assert server.complete("Hello").status_code == 200
    with pytest.raises(openai.NotFoundError, match="tiny-mixtral"):
        client.completions.create(model="other", prompt="Hello")


def test_a_prompt_over_the_context_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as caught:
        client.completions.create(model="tiny-mixtral", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"


def test_a_client_that_hangs_up_frees_its_place(server: ServerProcess) -> None:
    body = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    end = time.monotonic() + 30
    while time.monotonic() < end:
        found = samples(server.metrics())
        if found["moestro_requests_running", ()] == 0:
            break
    assert found["moestro_requests_running", ()] == 0
    assert found["moestro_kv_cache_usage_ratio", ()] == 0
    aborted = (("endpoint", "completions"), ("finish_reason", "abort"))
    assert found["moestro_requests_total", aborted] >= 1


def test_the_books_of_the_cache_balance(server: ServerProcess) -> None:
    for number in range(5):
        assert server.complete(f"prompt {number}", max_tokens=8).status_code == 200
    found = samples(server.metrics())

    def total(name: str, **labels: str) -> float:
        wanted = set(labels.items())
        return sum(
            value for (n, given), value in found.items() if n == name and wanted <= set(given)
        )

    lookups = total("moestro_expert_lookups_total")
    parts = [
        total("moestro_expert_lookups_total", result=result)
        for result in ("hit", "prefetch_hit", "miss")
    ]
    loads = total("moestro_expert_loads_total")
    assert lookups == sum(parts) > 0
    assert total("moestro_expert_transfer_bytes_total") == loads * total(
        "moestro_expert_blob_bytes"
    )
    assert total("moestro_expert_cache_used_bytes") <= SLOTS


def test_no_prompt_text_in_the_log(server: ServerProcess) -> None:
    secret = "xylophonesecret"
    assert server.complete(secret, max_tokens=4).status_code == 200
    assert server.complete(secret + "\ud83d" * 0, max_tokens=-2).status_code == 400
    assert secret not in server.log


def test_the_start_says_what_was_found_and_planned(server: ServerProcess) -> None:
    for words in (
        "found ",
        "mixtral, 4 layers of 8 experts",
        "memory plan: ",
        "fixed ",
        "--host-memory",
        "expert cache: 6 slots",
        "prefetch: on",
        f"{server.url}",
        "curl ",
    ):
        assert words in server.log, words


def test_sigterm_finishes_running_work_and_exits_0(model: Path) -> None:
    with serving(model, "--cache-dir", str(model.parent / "cache"), "--threads", "1") as server:
        body = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.wait_exit() == 0


def test_ctrl_c_exits_130(model: Path) -> None:
    with serving(model, "--cache-dir", str(model.parent / "cache"), "--threads", "1") as server:
        server.signal(signal.SIGINT)
        assert server.wait_exit() == 130
        assert "Traceback" not in server.log


def refused(*flags: str, model: str | Path = "demo") -> str:
    server = ServerProcess(str(model), *flags)
    assert server.wait_exit() == 2, server.log
    assert "Traceback" not in server.log
    last = server.lines[-1]
    assert last.startswith("moestro: ")
    return last


def test_refusals_at_start_are_one_line_and_exit_2(model: Path, tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path))
    assert "there is no folder" in refused(*cache, model=tmp_path / "nowhere")
    assert "smallest value that works is 96" in refused(
        "--host-memory", "60000", *cache, model=model
    )
    assert "--device-memory" in refused("--device-memory", "1GiB", *cache, model=model)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        assert port in refused("--port", port, *cache, model=model)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_pack_is_rebuilt(model: Path, tmp_path: Path) -> None:
    flags = ("--cache-dir", str(tmp_path), "--threads", "1")
    with serving(model, *flags) as server:
        wanted = server.complete("Hello", max_tokens=16).json()["choices"][0]["text"]
    (pack,) = tmp_path.rglob("*.pack")
    blob = bytearray(pack.read_bytes())
    blob[-5000] ^= 0xFF
    pack.write_bytes(blob)
    with serving(model, *flags) as server:
        found = server.complete("Hello", max_tokens=16).json()["choices"][0]["text"]
        assert "corrupt" in server.log or "checksum" in server.log
    assert found == wanted


def test_two_starts_share_one_pack(model: Path, tmp_path: Path) -> None:
    flags = ("--cache-dir", str(tmp_path), "--threads", "1")
    with serving(model, *flags) as first, serving(model, *flags) as second:
        answers = [server.complete("Hello", max_tokens=16).json() for server in (first, second)]
        texts = {answer["choices"][0]["text"] for answer in answers}
    assert len(texts) == 1
    assert len(list(tmp_path.rglob("*.pack"))) == 1
