"""A real `moestro serve` on loopback: started, waited for, looked at from outside, stopped."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

READY_S = 240.0
SAMPLE_S = 0.02


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """One server. `log` is all that it has printed; `peak_rss_bytes` all that it ever took."""

    def __init__(
        self, model: str, *flags: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: list[str] = []
        command = [sys.executable, "-m", "moestro.server", "serve", model, "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
        )
        self.peak_rss_bytes = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_ready(self) -> None:
        end = time.monotonic() + READY_S
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the server ended with {self.process.returncode}:\n{self.log}"
                )
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready after {READY_S} s:\n{self.log}")

    def wait_exit(self, timeout_s: float = 60.0) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(10)
        self._sampler.join(10)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def metrics(self) -> str:
        return httpx.get(f"{self.url}/metrics", timeout=60).text

    def complete(self, prompt: object, **fields: object) -> httpx.Response:
        body = {"prompt": prompt, "temperature": 0, **fields}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=300)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def _sample(self) -> None:
        try:
            watched = psutil.Process(self.process.pid)
            while self.process.poll() is None:
                self.peak_rss_bytes = max(self.peak_rss_bytes, watched.memory_info().rss)
                time.sleep(SAMPLE_S)
        except psutil.NoSuchProcess:
            pass


@contextmanager
def serving(model: str | Path, *flags: str) -> Iterator[ServerProcess]:
    """A ready server, killed afterwards if it is still there."""
    server = ServerProcess(str(model), *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.wait_exit()
