"""STUDY.md, from the records alone: nothing in it is written by hand. Knows no model."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .cells import ACCURACY, FORMAT, QUALITY, SPEED, Cell, Record, Store
from .figures import Answers, Estimate, Kept, kept, perplexities, pooled_above_chance, ratio
from .plots import Bar, Point, bars_svg, lines_svg
from .rows import GEOMETRIES, TASKS, WINDOW_TOKENS

NOT_RUN = "not run"
TITLES = {
    "dense": "dense",
    "oracle": "per-neuron oracle",
    "griffin": "GRIFFIN",
    "experts": "experts",
    "demo": "the shipped demo (recovered)",
    "recovered": "experts, recovered here",
}
HEAD = """# Study: splits, routers and recovery on SmolLM2-135M

Written by `make study` from the records in `results/`; do not edit. `make study` measures what is
missing, `make study ARGS="--list"` names it, `make study ARGS="--only NAME"` measures some.
"""
READING = """Perplexity of {windows} windows of {tokens} tokens of each held-out text, fp32, by the
dense model with what is not chosen masked. *Ratio*: geometric mean over the texts of perplexity /
dense, with its standard error over windows (paired). *KL*: KL(dense || row) in nats per token,
every 4th token. *MB per token*: weights read in bfloat16, the output matrix included. *Hit rate*:
decoding token by token with half of the experts in memory, the default policy, one window of each
text. *Tokens/s*: greedy decode on the engine by geometry, one thread, native weights, everything in
memory; the dense model runs as all experts of the 75 % geometry. Seed {seed}; one run a cell.

{geometries}. Oracle and GRIFFIN choose single
neurons. GRIFFIN runs the first half of a window whole; its perplexity, ratio and KL are those of
the second half, against dense on the same half. Plans are fitted on {calibration} tokens.
"""
ACCURACY_READING = """Zero-shot, by log-likelihood: raw / per character, with standard errors in
brackets. {counts}. *Above chance*: share of right answers less 1 / choices over all questions of
the three tasks together, each task judged by the metric that its file names; *kept*: its share of
the dense model's, with a 95 % bootstrap interval (2,000 draws of the questions, seed {seed}).
"""

Key = tuple[str, str, str, float]  # method, split, router, active share
DENSE_KEY: Key = ("dense", "", "", 1.0)


def write_study(store: Store, page: Path, planned: Iterable[Cell]) -> None:
    """The page and its plots beside it. Raises RecordInvalid."""
    planned = list(planned)
    study = Study(store.all(), planned)
    page.parent.mkdir(parents=True, exist_ok=True)
    for name, plot in study.plots().items():
        (page.parent / name).write_text(plot, "utf-8")
    page.write_text(study.page(), "utf-8")


class Study:
    """Records that go together: what was measured otherwise than the dense model, or on other

    texts, is left out.
    """

    def __init__(self, records: Sequence[Record], planned: Sequence[Cell]) -> None:
        known = {x.cell: x for x in records if x.conditions["format"] == FORMAT}
        self.dense = known.get(Cell(QUALITY, "dense"))
        wanted = None if self.dense is None else self.dense.conditions["held_out_sha256"]
        self.records = {
            cell: record
            for cell, record in known.items()
            if record.conditions.get("held_out_sha256", wanted) == wanted
        }
        cells = [*planned, *(cell for cell in self.records if cell not in planned)]
        self.cells = list(dict.fromkeys(cells))
        self.seed = self.cells[0].seed if self.cells else 0

    def page(self) -> str:
        parts = [HEAD, self._machines(), "## Quality\n", self._reading(), self._quality()]
        parts += ["![Ratio by active share](ratio.svg)\n", "## Accuracy\n"]
        words = ACCURACY_READING.format(seed=self.seed, counts=self._counts())
        parts += [words, self._accuracy()]
        parts += ["![Above-chance accuracy kept](accuracy.svg)\n", self._left()]
        return "\n".join(parts)

    def plots(self) -> dict[str, str]:
        return {
            "ratio.svg": lines_svg("perplexity / dense", self._points()),
            "accuracy.svg": bars_svg("above-chance accuracy kept", self._bars()),
        }

    def _reading(self) -> str:
        if self.dense is None:
            return "The dense model is not measured yet: nothing can be compared.\n"
        shapes = [
            f"{100 * share:g} %: {shape.shared} shared neurons and {shape.active} of"
            f" {shape.experts} experts of 32"
            for share, shape in GEOMETRIES.items()
        ]
        conditions = [record.conditions for record in self.records.values()]
        fitted = {x["calibration_tokens"] for x in conditions if "calibration_tokens" in x}
        return READING.format(
            windows=self.dense.conditions["windows"],
            tokens=WINDOW_TOKENS,
            seed=self.seed,
            geometries=";\n".join(shapes),
            calibration=" or ".join(f"{each:,}" for each in sorted(fitted)) or "no",
        )

    def _machines(self) -> str:
        """Of all records; what they ran on is part of a speed."""
        found = {
            f"{m['cpu']} ({m['cores']} cores, {m['threads']} thread), torch {m['torch']},"
            f" transformers {m['transformers']}, moestro {m['moestro']}"
            for m in (record.machine for record in self.records.values())
        }
        minutes = sum(record.seconds for record in self.records.values()) / 60
        where = "; ".join(sorted(found)) or "nothing"
        return f"Measured on: {where}. {len(self.records)} cells, {minutes:.0f} minutes in all.\n"

    def _quality(self) -> str:
        head = "| row | split | router | FFN | passages | everyday | Python | ratio | KL |"
        lines = [f"{head} MB per token | hit rate | tokens/s |", "| --- " * 12 + "|"]
        for cell in (each for each in self.cells if each.measure == QUALITY):
            lines.append(self._quality_line(cell))
        return "\n".join(lines) + "\n"

    def _quality_line(self, cell: Cell) -> str:
        words = [TITLES[cell.method], cell.split or "-", cell.router or "-"]
        words.append(f"{100 * cell.active:g} %")
        record = self.records.get(cell)
        if record is None or self.dense is None:
            return "| " + " | ".join([*words, NOT_RUN, *[""] * 7]) + " |"
        values = record.values
        if cell.method == "recovered":
            words[0] += f", {values['recovery_steps']} steps"
        texts = perplexities(values[_scored(cell)])
        words += [f"{value:.2f}" for value in texts]
        words += [_ratio_words(self.ratio(cell)), f"{values['kl']:.3f}"]
        words.append(f"{values['bytes_per_token'] / 1e6:.0f}")
        words.append(f"{values['hit_rate']:.3f}" if "hit_rate" in values else "-")
        return "| " + " | ".join([*words, self._speed(cell)]) + " |"

    def ratio(self, cell: Cell) -> Estimate | None:
        """None where the cell or the dense model is not measured."""
        record = self.records.get(cell)
        if record is None or self.dense is None:
            return None
        name = _scored(cell)
        return ratio(record.values[name], self.dense.values[name])

    def _speed(self, cell: Cell) -> str:
        """Of the geometry; neurons that are chosen one by one are not served."""
        if cell.method in ("oracle", "griffin"):
            return "-"
        method = "dense" if cell.active == 1 else "experts"
        record = self.records.get(Cell(SPEED, method, active=cell.active))
        return NOT_RUN if record is None else f"{record.values['tokens_per_s']:.1f}"

    def _accuracy(self) -> str:
        tasks = " | ".join(TASKS)
        lines = [f"| row | split | router | FFN | {tasks} | above chance | kept |"]
        lines.append("| --- " * (6 + len(TASKS)) + "|")
        for key in self._answered():
            lines.append(self._accuracy_line(key))
        return "\n".join(lines) + "\n"

    def _counts(self) -> str:
        """How many questions each task has asked."""
        found = {
            cell.task: len(record.values["choices"])
            for cell, record in self.records.items()
            if cell.measure == ACCURACY
        }
        told = [f"{found[task]} questions of {task}" for task in TASKS if task in found]
        return ", ".join(told) or "No question is asked yet"

    def _answered(self) -> list[Key]:
        return list(dict.fromkeys(_key(c) for c in self.cells if c.measure == ACCURACY))

    def _accuracy_line(self, key: Key) -> str:
        method, split, router, active = key
        words = [TITLES[method], split or "-", router or "-", f"{100 * active:g} %"]
        for task in TASKS:
            record = self._answers_record(key, task)
            if record is None:
                words.append(NOT_RUN)
                continue
            pair = [_answers(record, each).accuracy for each in ("raw", "per_character")]
            words.append(" / ".join(f"{x.value:.3f} ({x.error:.3f})" for x in pair))
        answers = self._answers(key)
        words.append(NOT_RUN if answers is None else f"{pooled_above_chance(answers):.3f}")
        words.append(self._kept_words(key))
        return "| " + " | ".join(words) + " |"

    def _kept_words(self, key: Key) -> str:
        if self._answers(key) is None or self._answers(DENSE_KEY) is None:
            return NOT_RUN
        found = self.kept(key)
        if found is None:
            return "dense too near to chance"
        return f"{found.share:.2f} [{found.low:.2f}, {found.high:.2f}]"

    def _answers_record(self, key: Key, task: str) -> Record | None:
        method, split, router, active = key
        return self.records.get(Cell(ACCURACY, method, split, router, active, task))

    def _answers(self, key: Key) -> Mapping[str, Answers] | None:
        """By each task's own metric; None until all tasks are there."""
        found = {}
        for task in TASKS:
            record = self._answers_record(key, task)
            if record is None:
                return None
            found[task] = _answers(record, record.values["metric"])
        return found

    def kept(self, key: Key) -> Kept | None:
        row, dense = self._answers(key), self._answers(DENSE_KEY)
        return None if row is None or dense is None else kept(row, dense, self.seed)

    def _left(self) -> str:
        left = [cell.name for cell in self.cells if cell not in self.records]
        if not left:
            return "Every cell that is decided so far has been run.\n"
        told = ", ".join(f"`{name}`" for name in left)
        return f"## Not run\n\n{len(left)} cells; `make study` measures them: {told}.\n"

    def _points(self) -> Iterator[Point]:
        for cell in self.cells:
            found = self.ratio(cell) if cell.measure == QUALITY else None
            if found is not None and cell.method != "dense":
                yield Point(_label(_key(cell)), cell.active, found.value)

    def _bars(self) -> Iterator[Bar]:
        for key in self._answered():
            found = self.kept(key)
            if found is not None and key[0] != "dense":
                yield Bar(_label(key), found.share, found.low, found.high)


def _key(cell: Cell) -> Key:
    return cell.method, cell.split, cell.router, cell.active


def _label(key: Key) -> str:
    return " ".join(part for part in key[:3] if part)


def _scored(cell: Cell) -> str:
    return "second_half" if cell.method == "griffin" else "losses"


def _ratio_words(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOT_RUN
    error = "" if math.isnan(estimate.error) else f" ± {estimate.error:.3f}"
    return f"{estimate.value:.3f}{error}"


def _answers(record: Record, metric: str) -> Answers:
    right = [bit == "1" for bit in record.values[metric]]
    return Answers(right, [int(each) for each in record.values["choices"]])
