"""Every language model with experts that transformers has: exact, or refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from family_names import BROKEN, KNOWN, without_config
from family_registry import LEFT_OUT, moe_model_types
from family_run import Outcome, outcome_of
from family_table import TABLE, page_text, read_cells, read_table

pytestmark = pytest.mark.families

KINDS = [
    pytest.param(kind, marks=pytest.mark.xfail(reason=BROKEN[kind])) if kind in BROKEN else kind
    for kind in KNOWN
]


def test_no_type_is_forgotten() -> None:
    there = {kind: name for kind, name in moe_model_types().items() if kind not in LEFT_OUT}
    assert without_config(there) == []
    assert there == KNOWN, "transformers has these no longer, or under another class"
    assert LEFT_OUT.keys() <= moe_model_types().keys()


def test_a_new_type_is_named() -> None:
    assert without_config({**KNOWN, "new_moe": "NewMoe"}) == ["no tiny config for new_moe (NewMoe)"]


@pytest.mark.parametrize("kind", KINDS)
def test_stock_logits_or_a_refusal(
    kind: str, tmp_path: Path, record: Callable[[str, Outcome], None]
) -> None:
    record(kind, outcome_of(kind, tmp_path))


def test_the_table_has_every_type_once_and_nothing_else() -> None:
    assert TABLE.read_text("utf-8") == page_text(read_table(), read_cells())
    assert list(read_table()) == [kind for kind in KNOWN if kind not in BROKEN]
