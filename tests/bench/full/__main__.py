"""`make bench-full`: every bar, or those named (ARGS="p1 p3")."""

import argparse
import importlib
import os
import sys
from pathlib import Path

import report

from .bench import Bench
from .geometry import GEOMETRIES, GIB
from .places import NoRoom, needed_bytes, workshop
from .quality import FORMATS, Quality

MODULES = {
    "p1": "p1_decode",
    "p2": "p2_prefill",
    "p3": "p3_disk",
    "p4": "p4_link",
    "p5": "p5_overhead",
    "p6": "p6_memory",
    "p7": "p7_batch",
    "p8": "p8_start",
    "p9": "p9_quality",
    "p10": "p10_demo",
    "p11": "p11_sequences",
    "p12": "p12_factorized",
    "p13": "p13_griffin",
}
SMALL = {"p5", "p7", "p9", "p10", "p11", "p12", "p13"}  # need no large model
DISK = {"p3", "p4", "p6"}  # need more of them than one


def arguments() -> argparse.Namespace:
    cache = Path(os.environ.get("MOESTRO_CACHE_DIR", Path.home() / ".cache" / "moestro"))
    folder = Path(os.environ.get("MOESTRO_BENCH_DIR", cache / "bench"))
    parser = argparse.ArgumentParser(prog="make bench-full", description=__doc__)
    parser.add_argument("bars", nargs="*", metavar="BAR", help=f"of {', '.join(MODULES)}")
    parser.add_argument("--folder", type=Path, default=folder, help="for models and packs")
    parser.add_argument("--peers", type=Path, default=cache / "bench-peers", help="installed peers")
    parser.add_argument("--turns", type=int, default=3, help="of each side, alternating")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="olmoe")
    parser.add_argument("--keep", action="store_true", help="leave models and packs there")
    quality = parser.add_argument_group("p9, for a look in a minute")
    quality.add_argument("--windows", type=int, default=Quality().windows, help="of the text")
    quality.add_argument(
        "--formats",
        type=pairs,
        default=FORMATS,
        help="experts/dense, … (native/native comes first)",
    )
    quality.add_argument("--norms", action="store_true", help="move what reads a norm, too")
    parser.set_defaults(cache=cache)
    found = parser.parse_args()
    unknown = [name for name in found.bars if name not in MODULES]
    if unknown:
        parser.error(f"no bar {', '.join(unknown)}: there are {', '.join(MODULES)}")
    return found


def pairs(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def main() -> int:
    chosen = arguments()
    names = chosen.bars or list(MODULES)
    shape = GEOMETRIES[chosen.geometry]
    needed = (
        0 if SMALL.issuperset(names) else needed_bytes(shape, disk_bars=not DISK.isdisjoint(names))
    )
    report.show(f"needs {needed / GIB:.0f} GiB in {chosen.folder}; removed at the end")
    try:
        with workshop(chosen.folder, needed, chosen.keep) as shop:
            quality = Quality.of(chosen.windows, chosen.formats, norms=chosen.norms)
            bench = Bench(shop, chosen.peers, shape, chosen.cache, chosen.turns, quality)
            if not bench.llama.available:
                report.show(f"no peers in {chosen.peers}: scripts/bench_peers.sh installs them")
            for name in names:
                importlib.import_module(f"full.{MODULES[name]}").run(bench)
            summary(bench)
    except NoRoom as error:
        print(f"bench-full: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        report.show("stopped; what was made is removed")
        return 130
    return 0


def summary(bench: Bench) -> None:
    missed = [bar for bar in bench.bars if not bar.met]
    report.show(f"== {len(bench.bars)} bars, {len(missed)} missed, {len(bench.missing)} left out")
    for bar in bench.bars:
        report.show(f"  {bar.line()}")
    for line in bench.missing:
        report.show(f"  left out: {line}")


if __name__ == "__main__":
    sys.exit(main())
