"""The picture of `moestro trace replay --plot`. Needs matplotlib, an extra, and no display."""

from pathlib import Path
from typing import TYPE_CHECKING

from moestro.engine import CEILING, ReplayTable
from moestro.server.facts import Refused

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
MIB = 1 << 20
GIB = 1 << 30
# Told apart in grey and by the colour-blind, too: each policy has a colour, a dash and a marker.
STYLES = (("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "^", "-."))
DOTS_PER_INCH = 150


def check_plot(path: Path) -> None:
    """Before any long work. Raises Refused where `draw` could not write `path`."""
    if path.suffix.lower() not in SUFFIXES:
        raise Refused(f"--plot {path}: the name must end in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise Refused(f"--plot {path}: there is no folder {path.absolute().parent}")
    try:
        import matplotlib.figure  # noqa: F401  # only asked for: it is an extra
    except ImportError as error:
        raise Refused(
            "--plot needs matplotlib, which is not installed: pip install 'moestro[plot]'"
        ) from error


def draw(table: ReplayTable, path: Path) -> None:
    """Hit rate of decode against bytes, one line per policy. Raises Refused if it cannot write."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot there is no window and no global state

    # Text stays text in an SVG: to be found, read aloud and compared.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "moestro"}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        _draw_lines(figure.add_subplot(), table)
        try:
            figure.savefig(path, dpi=DOTS_PER_INCH, format=path.suffix.lower().removeprefix("."))
        except OSError as error:
            raise Refused(f"--plot {path}: {error.strerror}") from error


def _draw_lines(axes: "Axes", table: ReplayTable) -> None:
    unit_bytes, unit = (GIB, "GiB") if table.experts * table.slot_bytes >= GIB else (MIB, "MiB")
    per_slot = table.slot_bytes / unit_bytes
    sizes = [slots * per_slot for slots in table.slots]
    styles = iter(STYLES)
    for row in table.rows:
        rates = [100 * rate for rate in row.hit_rates]
        if row.policy == CEILING:
            axes.plot(sizes, rates, color="black", linewidth=1.2, label=row.policy)
            axes.fill_between(sizes, rates, 100, color="black", alpha=0.07, linewidth=0)
        else:
            color, marker, line = next(styles)
            axes.plot(
                sizes,
                rates,
                color=color,
                marker=marker,
                linestyle=line,
                label=row.policy,
                markersize=4.5,
            )
    if table.live is not None:
        axes.plot(
            [table.live.slots * per_slot],
            [100 * table.live.hit_rate],
            linestyle="none",
            marker="*",
            markersize=14,
            color="#F0E442",
            markeredgecolor="black",
            label="live, while recording",
            zorder=3,
            clip_on=False,  # it may lie at the edge: everything resident
        )
    whole = table.experts * per_slot
    axes.set_xlim(0, whole)
    axes.set_ylim(0, 100)
    axes.set_xlabel(f"room for experts, {unit}")
    axes.set_ylabel("hit rate of decode, %")
    axes.set_title(f"{table.steps} steps, {table.experts} experts of {per_slot:.3g} {unit}")
    share = axes.twiny()
    share.set_xlim(0, 100)
    share.set_xlabel("share of all experts, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", framealpha=0.95)
