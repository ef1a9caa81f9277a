"""Every language model with experts that transformers has: exact, or refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from family_names import BROKEN, KNOWN
from family_registry import LEFT_OUT, moe_model_types
from family_run import Outcome, outcome_of
from family_table import TABLE, read_table, table_text

pytestmark = pytest.mark.families

KINDS = [
    pytest.param(kind, marks=pytest.mark.xfail(reason=BROKEN[kind])) if kind in BROKEN else kind
    for kind in KNOWN
]


def test_no_type_is_forgotten() -> None:
    there = moe_model_types()
    unknown = sorted(there.keys() - KNOWN.keys() - LEFT_OUT.keys())
    assert not unknown, "; ".join(f"no tiny config for {kind} ({there[kind]})" for kind in unknown)
    gone = sorted((KNOWN.keys() | LEFT_OUT.keys()) - there.keys())
    assert not gone, f"transformers has these no longer: {', '.join(gone)}"
    assert {kind: there[kind] for kind in KNOWN} == KNOWN


@pytest.mark.parametrize("kind", KINDS)
def test_stock_logits_or_a_refusal(
    kind: str, tmp_path: Path, record: Callable[[str, Outcome], None]
) -> None:
    record(kind, outcome_of(kind, tmp_path))


def test_the_table_has_every_type_once_and_nothing_else() -> None:
    assert TABLE.read_text("utf-8") == table_text(read_table())
    assert list(read_table()) == [kind for kind in KNOWN if kind not in BROKEN]
