"""A start that is killed while it packs, and the next one, which goes on from there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from server_process import serving

PACKING = """
import sys
from pathlib import Path
from moestro.engine import EngineConfig, record_trace

def progress(notice):
    if notice.phase == "pack" and notice.done == 2:
        print("packing layer 2", flush=True)
        sys.stdin.readline()

model, cache = map(Path, sys.argv[1:])
record_trace(EngineConfig(model, cache, threads=1), ["Hello"], 1, cache / "trace", progress)
"""


def kill_while_packing(model: Path, cache: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PACKING, str(model), str(cache)],
        env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "packing layer 2\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_start_killed_while_packing_is_resumed(tmp_path: Path) -> None:
    model = tiny.build("mixtral", tmp_path / "tiny-mixtral")
    packs, texts = list[bytes](), list[str]()
    for name in ("whole", "killed"):
        cache = tmp_path / name
        if name == "killed":
            kill_while_packing(model, cache)
            assert not list(cache.rglob("*.pack")) and len(list(cache.rglob("*.partial"))) == 1
        with serving(model, "--cache-dir", str(cache), "--threads", "1") as server:
            texts.append(server.complete("Hello", max_tokens=8).json()["choices"][0]["text"])
            resumed = "resuming: 2 of 4 layers are packed" in server.log
            assert resumed == (name == "killed"), server.log
        (pack,) = cache.rglob("*.pack")
        packs.append(pack.read_bytes())
        assert not [*cache.rglob("*.partial"), *cache.rglob("*.journal")]
    assert packs[0] == packs[1]
    assert texts[0] == texts[1]
