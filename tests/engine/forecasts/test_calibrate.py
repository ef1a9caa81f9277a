"""The measurements are short, plausible, and leave nothing behind."""

import os
import time
from pathlib import Path

import pytest
import torch

from moestro.engine import StartError
from moestro.engine.forecasts.calibrate import Matrices, measure_link, measure_multiply
from moestro.engine.formats.named import FORMATS, codec_of


def test_the_disk_is_measured_where_the_cache_will_be(tmp_path: Path) -> None:
    began_s = time.monotonic()
    link = measure_link(tmp_path / "not" / "yet" / "there", 100_000, [tmp_path / "no.pack"])
    assert time.monotonic() - began_s < 10  # 0.5 s on an idle machine
    assert 1e5 < link.scattered_bytes_per_s <= link.ordered_bytes_per_s < 1e12
    assert str(tmp_path) in link.source
    assert not list(tmp_path.iterdir())


def test_a_large_file_that_is_there_is_read_instead(tmp_path: Path) -> None:
    pack = tmp_path / "native.pack"
    pack.write_bytes(os.urandom(16 << 20))
    tmp_path.chmod(0o500)  # a scratch file would need room here
    try:
        assert measure_link(tmp_path, 100_000, [pack]).scattered_bytes_per_s > 1e5
    finally:
        tmp_path.chmod(0o700)


def test_a_disk_that_cannot_be_measured_is_refused_with_the_flag() -> None:
    with pytest.raises(StartError, match="/proc/self cannot be measured.*--disk-speed"):
        measure_link(Path("/proc/self/cache"), 100_000, [])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_are_measured_in_every_format(name: str, rows: int, transposed: bool) -> None:
    shapes = {"up": (torch.bfloat16, (64, 32)), "down": (torch.bfloat16, (32, 64))}
    kind = Matrices(shapes, transposed, numbers=8 * 4096)
    assert kind.numbers_each == 4096
    assert 1e4 < measure_multiply(codec_of(name, torch.float32), kind, rows) < 1e14


def test_large_matrices_are_measured_in_part() -> None:
    kind = Matrices({"up": (torch.float32, (1 << 20, 1 << 10))}, False, 1 << 30)
    began_s = time.monotonic()
    measure_multiply(codec_of("native", torch.float32), kind, 1)
    assert time.monotonic() - began_s < 10  # 0.15 s on an idle machine
