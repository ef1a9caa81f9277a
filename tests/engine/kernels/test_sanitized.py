"""The C products with buffers of exact size, compiled under the address and undefined sanitizers.

The fast part checks the best instruction sets here, and has the portable one, unchecked, to compare
with; the slow part checks all, optimized as much as sanitizers allow in reasonable time.
"""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from moestro.engine.kernels import instruction_sets
from source_tree import REPO

SOURCES = REPO / "engine" / "kernels" / "src"
DRIVER = Path(__file__).with_name("products_check.c")
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
OPTIONS = (
    *("-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=off"),
    *("-pthread", "-I", str(SOURCES)),
    "-DROUND_BYTES=2048",  # a call of a few rows has several rounds of experts
    "-DPANELS_BYTES=8192",  # and a call of many several blocks of them
)
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FILE_OF = {
    "amx-int8": "isa_avx512",
    "avx512-vnni": "isa_avx512",
    "avx-vnni": "isa_avxvnni",
    "avx2": "isa_avx2",
    "plain": "isa_plain",
}
TABLE_OF = {**FILE_OF, "amx-int8": "isa_amx"}
HERE = instruction_sets() or ["plain"]

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler (cc, gcc, clang) is here")


def build(folder: Path, level: str, sets: Iterable[str]) -> Path:
    """The driver with all of the library but the other instruction sets, compiled side by side."""
    checked = {FILE_OF[name] for name in sets}
    kept = {*checked, "isa_plain"}
    left_out = folder / "left_out.c"
    missing = [name for name in FILE_OF if FILE_OF[name] not in kept]
    stubs = "".join(f'const isa {TABLE_OF[name]} = {{.name = "none"}};\n' for name in missing)
    files = dict.fromkeys(FILE_OF[name] for name in missing)
    stubs += "".join(f"const step_isa {file.replace('isa', 'step')} = {{0}};\n" for file in files)
    left_out.write_text(f'#include "step.h"\n#if defined(__x86_64__)\n{stubs}#endif\n', "utf-8")
    chosen = [path for path in SOURCES.glob("*.c") if path.stem not in FILE_OF.values()]
    chosen += [SOURCES / f"{file}.c" for file in kept]
    jobs = []
    for path in (*chosen, left_out, DRIVER):
        made = folder / f"{path.stem}.o"
        reference = path.stem == "isa_plain" and path.stem not in checked
        options = [*OPTIONS, level, *(() if reference else SANITIZE)]
        jobs.append((made, subprocess.Popen([COMPILER, *options, "-c", path, "-o", made])))
    assert [job.wait() for _, job in jobs] == [0] * len(jobs)
    program = folder / "products_check"
    objects = [made for made, _ in jobs]
    subprocess.run([COMPILER, *OPTIONS, *SANITIZE, *objects, "-o", program, "-lm"], check=True)
    return program


def check(program: Path, name: str) -> None:
    done = subprocess.run([program, name], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_products_keep_to_their_buffers(tmp_path: Path) -> None:
    best = [name for name in HERE if FILE_OF[name] == FILE_OF[HERE[0]]]
    program = build(tmp_path, "-O0", best)
    for name in best:
        check(program, name)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("sanitized"), "-O1", FILE_OF)


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_every_instruction_set_keeps_to_its_buffers(name: str, everything: Path) -> None:
    check(everything, name)
