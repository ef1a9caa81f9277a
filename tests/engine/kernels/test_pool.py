"""The C pool, compiled alone with a program that hammers it, under each sanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

from source_tree import REPO

SOURCES = REPO / "engine" / "kernels" / "src"
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
WARNINGS = ("-std=c11", "-Wall", "-Wextra", "-Werror")
PLAIN, THREAD, ADDRESS = "plain", "thread", "address,undefined"
EVERYWHERE = ("once", "short", "together", "nested", "callers", "fork", "fork-within", "sleep")
# A child with threads is more than the thread sanitizer follows; without memory no sanitizer runs.
CHECKS = {
    PLAIN: (*EVERYWHERE, "child", "refused"),
    THREAD: EVERYWHERE,
    ADDRESS: (*EVERYWHERE, "child"),
}

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler (cc, gcc, clang) is here")


@pytest.fixture(scope="module", params=CHECKS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The program, and the checks that this build of it can run."""
    sanitizer: str = request.param
    program = tmp_path_factory.mktemp("pool") / "pool_check"
    wanted = [] if sanitizer == PLAIN else [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    files = ("-I", SOURCES, SOURCES / "pool.c", Path(__file__).with_name("pool_check.c"))
    options = (*WARNINGS, "-O1", "-g", *wanted, "-pthread")
    subprocess.run((COMPILER, *options, *files, "-o", program), check=True)
    start = [*(fixed_addresses() if sanitizer == THREAD else []), str(program)]
    return start, CHECKS[sanitizer]


def fixed_addresses() -> list[str]:
    """What an older thread sanitizer needs where the kernel spreads addresses widely."""
    command = ["setarch", "-R"]
    there = shutil.which("setarch") is not None
    fine = there and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if fine else []


def hammer(program: list[str], rounds: int, checks: tuple[str, ...]) -> None:
    done = subprocess.run([*program, str(rounds), *checks], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_pool_keeps_its_promises(built):
    program, checks = built
    hammer(program, 8, checks)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS[PLAIN])
def test_the_pool_keeps_its_promises_for_long(built, check):
    program, checks = built
    if check in checks:
        hammer(program, 400, (check,))


def test_only_the_interface_is_exported(tmp_path):
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm is here")
    made = tmp_path / "pool.o"
    subprocess.run([COMPILER, *WARNINGS, "-O2", "-c", SOURCES / "pool.c", "-o", made], check=True)
    listed = subprocess.run([nm, "-g", "--defined-only", made], capture_output=True, text=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert names == {"moestro_pool_run", "moestro_pool_set_threads", "moestro_pool_threads"}
