"""Every panel asks for something that the server really exports, and asks for it well.

What the server exports is read off a real /metrics page: a renamed metric, a label that went away
or a value that is never counted fails here, not on somebody's screen.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from exposition import Exported

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))

# Labels that Prometheus adds to everything it scrapes.
TARGET_LABELS = {"job", "instance"}

SELECTOR = re.compile(r"(?P<name>[a-zA-Z_:][\w:]*)\{(?P<matchers>[^}]*)\}")
MATCHER = re.compile(r'(?P<label>\w+)\s*(?:=~|!=|!~|=)\s*"(?P<value>[^"]*)"')
BY = re.compile(r"\bby\s*\(([^)]*)\)")

Json = dict[str, Any]


def panels(board: Json) -> list[Json]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def all_panels() -> list[Any]:
    return [
        pytest.param(panel, id=f"{path.stem}-{panel['id']}-{panel['title'].replace(' ', '_')}")
        for path in BOARDS
        for panel in panels(json.loads(path.read_text("utf-8")))
    ]


def expressions(panel: Json) -> list[str]:
    return [target["expr"] for target in panel["targets"]]


def substituted(expression: str) -> str:
    """With the variables filled in, as Grafana would send it."""
    filled = expression.replace("$__rate_interval", "40s")
    return re.sub(r"\$(job|instance)\b", ".+", filled)


@pytest.fixture(params=BOARDS, ids=lambda path: path.stem)
def board(request: pytest.FixtureRequest) -> Json:
    loaded: Json = json.loads(request.param.read_text("utf-8"))
    return loaded


every_panel = pytest.mark.parametrize("panel", all_panels())


@every_panel
def test_metrics_exist(panel: Json, exported: Exported) -> None:
    for expression in expressions(panel):
        names = set(re.findall(r"\bmoestro_\w+", expression))
        assert names, expression
        assert names <= exported.keys(), sorted(names - exported.keys())


@every_panel
def test_metrics_named_in_the_description_exist(panel: Json, exported: Exported) -> None:
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported} | exported.keys()
    assert set(re.findall(r"\bmoestro_\w+", panel["description"])) <= families


@every_panel
def test_labels_and_their_values_exist(panel: Json, exported: Exported) -> None:
    for expression in expressions(panel):
        known = set(TARGET_LABELS)
        for selector in SELECTOR.finditer(expression):
            labels = exported[selector["name"]].labels
            known |= labels.keys()
            for matcher in MATCHER.finditer(selector["matchers"]):
                if matcher["label"] in TARGET_LABELS:
                    continue
                assert set(matcher["value"].split("|")) <= labels[matcher["label"]], expression
        grouped = {label.strip() for group in BY.findall(expression) for label in group.split(",")}
        assert grouped <= known, expression


@every_panel
def test_legends_name_labels_that_are_left(panel: Json) -> None:
    for target in panel["targets"]:
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        groups = [set(re.split(r",\s*", group)) for group in BY.findall(target["expr"])]
        left = set.intersection(*groups) if groups else TARGET_LABELS
        assert shown <= left, target["expr"]


@every_panel
def test_every_selector_is_bound_to_job_and_instance(panel: Json) -> None:
    for expression in expressions(panel):
        names = re.findall(r"\bmoestro_\w+", expression)
        selectors = list(SELECTOR.finditer(expression))
        assert [selector["name"] for selector in selectors] == names
        for selector in selectors:
            assert selector["matchers"].startswith('job=~"$job", instance=~"$instance"')


@every_panel
def test_counters_are_seen_only_as_rates(panel: Json, exported: Exported) -> None:
    for expression in expressions(panel):
        for selector in SELECTOR.finditer(expression):
            before, after = expression[: selector.start()], expression[selector.end() :]
            counts = exported[selector["name"]].kind in {"counter", "histogram"}
            assert before.endswith("rate(") == counts, expression
            assert after.startswith("[$__rate_interval])") == counts, expression


@every_panel
def test_nothing_is_divided_by_zero(panel: Json) -> None:
    for expression in expressions(panel):
        for divisor in re.split(r" / ", expression)[1:]:
            assert divisor.startswith("("), expression
            depth, end = 0, 0
            for end, letter in enumerate(divisor):  # noqa: B007
                depth += {"(": 1, ")": -1}.get(letter, 0)
                if depth == 0:
                    break
            assert divisor[:end].endswith("> 0"), expression


@every_panel
def test_a_panel_explains_itself(panel: Json) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 40
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["fieldConfig"]["defaults"]["noValue"]
    assert panel["targets"]
    for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
        assert source == {"type": "prometheus", "uid": "${datasource}"}


def test_the_board_follows_its_variables(board: Json) -> None:
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance"]
    assert variables["datasource"]["type"] == "datasource"
    for name in ("job", "instance"):
        assert variables[name]["datasource"]["uid"] == "${datasource}"
        assert variables[name]["refresh"] == 2, "reload when the time range changes"
        assert variables[name]["multi"]
        assert variables[name]["includeAll"]


def test_the_boards_variables_ask_for_real_metrics(board: Json, exported: Exported) -> None:
    for variable in board["templating"]["list"][1:]:
        assert set(re.findall(r"moestro_\w+", variable["query"]["query"])) <= exported.keys()


def test_the_board_starts_with_the_provisioned_source(board: Json) -> None:
    provisioned = DEPLOY / "grafana/provisioning/datasources/prometheus.yml"
    (source,) = yaml.safe_load(provisioned.read_text("utf-8"))["datasources"]
    assert board["templating"]["list"][0]["current"]["value"] == source["uid"]


def test_the_board_is_fixed_and_its_panels_do_not_overlap(board: Json) -> None:
    assert board["editable"] is False
    assert board["uid"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken = set[tuple[int, int]]()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def promtool(*arguments: str | Path, text: str | None = None) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool (of Prometheus) is not on this machine")
    command = [tool, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_every_expression(tmp_path: Path) -> None:
    rules = [
        {"record": f"board:panel{panel['id']}:target{number}", "expr": substituted(expression)}
        for path in BOARDS
        for panel in panels(json.loads(path.read_text("utf-8")))
        for number, expression in enumerate(expressions(panel))
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}), "utf-8")
    promtool("check", "rules", path)


def test_the_hit_rate_is_hits_over_lookups(tmp_path: Path, board: Json) -> None:
    (panel,) = (p for p in panels(board) if p["title"] == "Hit rate" and p["type"] == "stat")
    (expression,) = expressions(panel)
    lookups = 'moestro_expert_lookups_total{job="moestro", instance="a", layer="0", result='
    per_scrape = {"hit": 20, "prefetch_hit": 10, "miss": 70}
    series = [  # counted for 200 s, then standing still
        {"series": f'{lookups}"{result}"}}', "values": f"0+{count}x20 {20 * count}x40"}
        for result, count in per_scrape.items()
    ]
    busy: Json = {"eval_time": "2m", "exp_samples": [{"labels": "{}", "value": 0.3}]}
    idle: Json = {"eval_time": "8m", "exp_samples": []}  # no traffic: nothing, not NaN
    asked = [{"expr": substituted(expression), **moment} for moment in (busy, idle)]
    case = {"interval": "10s", "input_series": series, "promql_expr_test": asked}
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [], "tests": [case]}), "utf-8")
    promtool("test", "rules", path)


def test_prometheus_accepts_its_configuration() -> None:
    promtool("check", "config", DEPLOY / "prometheus/prometheus.yml")


def test_prometheus_accepts_the_metrics(metrics_page: str) -> None:
    promtool("check", "metrics", text=metrics_page)
