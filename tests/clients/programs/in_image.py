"""Uses a container of the image that computes on the CPU, as its users do: `make image-test`.

    python in_image.py COMMAND…

COMMAND runs what follows it inside the container, where a model's folder is /model. Prints what was
seen; ends with an AssertionError where something is not as promised. Needs the `openai` package.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from openai import OpenAI

READY_S = 120
USER = 10001


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def output(container: Sequence[str], *command: str) -> str:
    done = subprocess.run([*container, *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def look_inside(container: Sequence[str]) -> None:
    """Who one is there, what one may write, and that the products' library is in it."""
    assert output(container, "id", "-u") == str(USER)
    refused = subprocess.run([*container, "touch", "/opt/moestro/x"], capture_output=True)
    assert refused.returncode != 0, "the program's own folder can be written"
    output(container, "touch", "/data/x")
    kernels = "from moestro.engine.kernels import chosen; print(chosen())"
    products = output(container, "python3", "-c", kernels)
    assert products not in ("", "None"), products
    print(f"image-test: user {USER}, products {products}")


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> float:
    began_s = time.monotonic()
    while time.monotonic() - began_s < READY_S:
        assert server.poll() is None, f"the server ended with {server.returncode}"
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2) as answer:
                if answer.status == 200:
                    return time.monotonic() - began_s
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready after {READY_S} s")


def ask(url: str) -> None:
    """A streamed answer is the whole one."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    (model,) = client.models.list().data
    asked = {"model": model.id, "prompt": "the", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    streamed = "".join(
        each.choices[0].text
        for each in client.completions.create(**asked, stream=True)
        if each.choices
    )
    assert whole and streamed == whole, (whole, streamed)
    print(f"image-test: the openai client, streamed and whole: {json.dumps(whole)}")


def server_pid(port: int) -> int:
    """Of the process that was started with this port: a container's are this machine's here."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            owner = process.stat().st_uid
        except OSError:
            continue
        serves = b"python" in words[0] and b"serve" in words  # and is not what runs it there
        if owner == USER and serves and str(port).encode() in words:
            return int(process.name)
    raise AssertionError("the server's process is not there")


def main(container: list[str]) -> None:
    look_inside(container)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    flags = ["--host", "127.0.0.1", "--port", str(port), "--kv-memory", "64MiB"]
    server = subprocess.Popen([*container, "moestro", "serve", "/model", *flags])
    try:
        print(f"image-test: ready after {wait_ready(url, server):.1f} s")
        ask(url)
        os.kill(server_pid(port), signal.SIGTERM)
        status = server.wait(60)
        assert status == 0, f"after SIGTERM it ended with {status}"
        print("image-test: SIGTERM ended it, exit 0")
    finally:
        if server.poll() is None:
            server.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
