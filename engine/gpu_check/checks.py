"""Which checks there are, in the order of what is known after the first minute."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import transformers as hf

from .bench import FULL, QUICK, Bench, Opener, Sizes
from .correctness import correctness
from .environment import environment, find_device
from .found import Check, Outcome, run_checks
from .link import arbitration, link
from .pinning import pinning
from .sampling import sampling
from .widths import widths

NO_GPU = "no GPU"


@dataclass(frozen=True, slots=True)
class Checked:
    """A whole run, as far as it got."""

    device_name: str
    imagined: bool
    quick: bool
    outcomes: Sequence[Outcome]


def check_gpu(
    device: str,
    scratch: Path,
    open_engine: Opener,
    keep: Callable[[Checked], None],
    *,
    quick: bool = False,
    sizes: Sizes | None = None,
) -> Checked:
    """All checks on `device` (cuda, cuda:N, or cpu: imagined), files below `scratch`.

    `keep` is told before and after each. `sizes` other than those of `quick` are for tests. Raises
    StartError where there is no such device, with nothing begun.
    """
    place, name = find_device(device)
    hf.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    chosen = sizes or (QUICK if quick else FULL)
    bench = Bench(place, name, chosen, scratch, open_engine, time.monotonic() + chosen.limit_s)

    def kept(outcomes: Sequence[Outcome]) -> None:
        keep(Checked(name, bench.imagined, quick, outcomes))

    outcomes = run_checks(_checks(bench), bench.left_s, kept, bench.tidy)
    return Checked(name, bench.imagined, quick, outcomes)


def _checks(bench: Bench) -> list[Check]:
    cannot = NO_GPU if bench.imagined else ""
    return [
        Check("environment", partial(environment, bench)),
        Check("pinned memory", partial(pinning, bench), cannot),
        Check("link", partial(link, bench), cannot),
        Check("copies side by side", partial(arbitration, bench), cannot),
        *(
            Check(f"correctness, {name}", partial(correctness, bench, expert_format=name))
            for name in bench.sizes.checked_formats
        ),
        Check("sampling", partial(sampling, bench)),
        *(
            Check(f"widths of {real.name}", partial(widths, bench, real=real))
            for real in bench.sizes.geometries
        ),
    ]
