"""The OpenAPI document tells the truth: schemathesis asks what it allows, and what it does not."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from client_environments import environment, run_command

FAKE_SERVER = Path(__file__).parents[1] / "support" / "fake_server.py"
KEY = "a-key"
SEED, EXAMPLES = "20", "50"
LEAST_CASES = 1000
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "ignored_auth",
)


@pytest.fixture
def url() -> Iterator[str]:
    command = [sys.executable, str(FAKE_SERVER), "--api-key", KEY]
    with Popen(command, stdout=PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().strip()
        finally:
            server.terminate()


def test_nothing_is_found(url: str, tmp_path: Path) -> None:
    told = run_command(
        [
            *(str(environment("schemathesis").parent / "schemathesis"), "run"),
            f"{url}/openapi.json",
            *("--header", f"Authorization: Bearer {KEY}", "--checks", ",".join(CHECKS)),
            *("--seed", SEED, "--max-examples", EXAMPLES),
            *("--phases", "examples,coverage,fuzzing", "--continue-on-failure"),
            *("--suppress-health-check", "all"),  # of speed: they hang on the machine
        ],
        cwd=tmp_path,
    )
    cases = re.search(r"(\d+) generated, (\d+) passed", told)
    assert cases is not None and cases[1] == cases[2], told
    assert int(cases[1]) > LEAST_CASES, "most of the document was left out"
