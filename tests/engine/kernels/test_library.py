"""The library that is found is the one that this package's Python was written for."""

import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from moestro.engine import StartError

module = import_module("moestro.engine.kernels.library")  # the door has a function of this name

needs_library = pytest.mark.skipif(not module.FILE.exists(), reason="no C library in this build")


@needs_library
def test_every_struct_is_as_large_as_in_c() -> None:
    found = module.load(module.FILE)
    assert found.moestro_struct_bytes(len(module._STRUCTS)) == -1


@needs_library
def test_one_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRUCTS", tuple(reversed(module._STRUCTS)))
    with pytest.raises(StartError, match="was built for another PromptCall; install moestro again"):
        module.load(module.FILE)


@needs_library
def test_one_without_a_function_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.c").write_text("int nothing;\n")
    path = tmp_path / "none.so"
    subprocess.run(["cc", "-shared", "-o", path, tmp_path / "none.c"], check=True)
    with pytest.raises(StartError, match="has no moestro_available: it is of another version"):
        module.load(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.so").write_bytes(b"nothing")
    with pytest.raises(StartError, match="does not load"):
        module.load(tmp_path / "none.so")
