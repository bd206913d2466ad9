"""The dashboards and rules in `configs/` ask for metrics that a gateway has, by labels that these have.

PromQL is not parsed in full here: names, matchers and groupings are found by their form, which is enough to notice that
something was renamed. Where `promtool` is installed (Debian's `prometheus`) it checks the grammar, and the alerts by
their own tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.sources import WORKER_UP
from gateway.state import LocalSource
from loadtests.engine import FakeEngine
from tests.support.serving import serving, settings_for

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "configs" / "prometheus"
DASHBOARDS = sorted((ROOT / "configs" / "grafana").glob("*.json"))
RULES = [PROMETHEUS / "rules.yaml", PROMETHEUS / "alerts.yaml"]
PAGE = ROOT / "docs" / "metrics.md"

PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")
NEEDS_PROMTOOL = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")

NAME = re.compile(r"\b(?:tidegate|process)[_:][a-zA-Z0-9_:]+")
SELECTOR = re.compile(r"\b((?:tidegate|process)[_:][a-zA-Z0-9_:]+)\s*\{([^}]*)\}")
MATCHER = re.compile(r'([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
OF_PROMETHEUS = {"instance", "job", "worker", "le"}
"""Labels that every sample may have: the scrape's, the worker's, and a bucket's bound."""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def documented_labels() -> dict[str, set[str]]:
    """Labels by the name of the metric, as docs/metrics.md has them; `tests/gateway/test_metrics.py` compares that."""
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if re.match(r"\| `(tidegate|process)_", line)]
    labels: dict[str, set[str]] = {}
    for row in rows:
        name, kind = row[1].strip().strip("`"), row[2].strip()
        for suffix in SUFFIXES[kind]:
            labels[name.removesuffix("_total") + suffix] = set(re.findall(r"`(\w+)`", row[3]))
    return labels


def expressions_of_rules() -> list[tuple[str, str]]:
    """Where it stands, and the expression."""
    return [
        (f"{path.name} {rule.get('record') or rule['alert']}", rule["expr"])
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def expressions_of_dashboard(path: Path) -> Iterator[tuple[str, str]]:
    dashboard = json.loads(path.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield f"{path.name} {panel['title']}", target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield f"{path.name} ${variable['name']}", variable["query"]["query"]


def expressions() -> list[tuple[str, str]]:
    queries = re.findall(r"```promql\n(.*?)```", PAGE.read_text(), re.DOTALL)
    of_tests = [
        ("alerts_test.yaml", series["series"])
        for test in yaml.safe_load((PROMETHEUS / "tests" / "alerts_test.yaml").read_text())["tests"]
        for series in test["input_series"]
    ]
    found = [*expressions_of_rules(), *((PAGE.name, query) for query in queries), *of_tests]
    return found + [each for path in DASHBOARDS for each in expressions_of_dashboard(path)]


def recorded() -> dict[str, set[str]]:
    """The rules' own names, each with the labels that its outermost grouping leaves."""
    found: dict[str, set[str]] = {}
    for group in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            first = re.search(r"\bby\s*\(([^)]*)\)", rule["expr"])
            found[rule["record"]] = set() if first is None else _labels(first[1]) - {"le"}
    return found


def _labels(text: str) -> set[str]:
    return {label.strip() for label in text.split(",") if label.strip()}


def _bare(expression: str) -> str:
    """Without the values of matchers, which may look like names."""
    return re.sub(r'"[^"]*"', '""', expression)


def test_there_is_something_to_check() -> None:
    assert len(expressions_of_rules()) > 50
    assert {path.stem for path in DASHBOARDS} == {
        "tidegate-overview",
        "tidegate-fleet",
        "tidegate-money",
        "tidegate-routing",
    }


async def test_every_metric_that_is_asked_for_is_one_that_a_gateway_has() -> None:
    collector = {"endpoint": "http://127.0.0.1:1"}
    async with FakeEngine() as engine, serving(settings_for([engine.url], telemetry=collector)) as gateway:
        families = await LocalSource(gateway.runtime).metrics()
    exposed = {family.name + suffix for family in families for suffix in SUFFIXES[family.type]} | {WORKER_UP}
    known = exposed | recorded().keys()
    for where, expression in expressions():
        for name in NAME.findall(_bare(expression)):
            assert name in known, f"{where}: there is no {name}"


def test_every_label_that_is_asked_for_is_one_that_the_metric_has() -> None:
    labels = {**documented_labels(), **recorded()}
    for where, expression in expressions():
        names = NAME.findall(_bare(expression))
        for name, matchers in SELECTOR.findall(expression):
            for label, _, _ in MATCHER.findall(matchers):
                assert label in labels[name] | OF_PROMETHEUS, f"{where}: {name} has no label {label}"
        of_any = set().union(*(labels[name] for name in names)) | OF_PROMETHEUS
        for grouping in GROUPING.findall(expression):
            assert _labels(grouping) <= of_any, f"{where}: {grouping}"


def test_values_that_are_asked_for_by_name_are_on_the_page_of_metrics() -> None:
    page = set(re.findall(r"`(\w+)`", PAGE.read_text()))
    free = {
        "class",
        "model",
        "pool",
        "replica",
        "instance",
        "worker",
        "le",
        "tenant",
        "gpu",
        "version",
        "python",
        "route",
    }
    for where, expression in expressions():
        for _, matchers in SELECTOR.findall(expression):
            for label, _, value in MATCHER.findall(matchers):
                words = set() if label in free or "$" in value else set(re.split(r"[|]", value))
                assert words <= page, f"{where}: {label} is never {words - page}"


def test_every_alert_says_what_is_wrong_what_to_do_and_how_urgent_it_is() -> None:
    names: list[str] = []
    for group in yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]:
        for alert in group["rules"]:
            names.append(alert["alert"])
            assert alert["labels"]["severity"] in ("critical", "warning", "info"), alert["alert"]
            summary, description = alert["annotations"]["summary"], alert["annotations"]["description"]
            assert 20 < len(summary) < 150, alert["alert"]
            assert len(description) > 60, alert["alert"]
            assert description.endswith("."), alert["alert"]
            shown = set(re.findall(r"\$labels\.(\w+)", summary + description))
            grouping = re.findall(r"\bby\s*\(([^)]*)\)", alert["expr"])
            labels = {**documented_labels(), **recorded()}
            names_in = NAME.findall(_bare(alert["expr"]))
            given = set().union(*map(_labels, grouping)) | set().union(*(labels[each] for each in names_in))
            assert shown <= given | OF_PROMETHEUS, alert["alert"]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_whole(path: Path) -> None:
    dashboard: dict[str, Any] = json.loads(path.read_text())
    assert dashboard["uid"] == path.stem
    assert len(dashboard["title"]) > 10
    source, *_ = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    ids, taken = [], set[tuple[int, int]]()
    for panel in dashboard["panels"]:
        ids.append(panel["id"])
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == panel["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$\{?([a-z]\w*)", target["expr"]))
            assert used <= variables, panel["title"]
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                grouped = re.findall(r"\bby\s*\(([^)]*)\)", target["expr"])
                in_groups = set().union(*map(_labels, grouped)) or documented_labels_of(target["expr"])
                assert label in in_groups, f"{panel['title']}: {label}"
    assert len(ids) == len(set(ids))


def documented_labels_of(expression: str) -> set[str]:
    labels = {**documented_labels(), **recorded()}
    return set().union(*(labels[name] for name in NAME.findall(_bare(expression)))) | OF_PROMETHEUS


# -- with promtool


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=60, check=False)


@NEEDS_PROMTOOL
def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    done = promtool("test", "rules", str(PROMETHEUS / "tests" / "alerts_test.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_PROMTOOL
def test_every_expression_is_promql(tmp_path: Path) -> None:
    asked = [
        re.sub(r"\$__(rate_interval|interval|range)", "5m", expression)
        for path in DASHBOARDS
        for where, expression in expressions_of_dashboard(path)
        if "$" not in where.partition(" ")[2]
    ]
    asked += [
        query
        for block in re.findall(r"```promql\n(.*?)```", PAGE.read_text(), re.DOTALL)
        for query in block.split("\n\n")
    ]
    rules = [{"record": f"a:{number}", "expr": expression} for number, expression in enumerate(asked)]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    done = promtool("check", "rules", str(path), *map(str, RULES))
    assert done.returncode == 0, done.stdout + done.stderr
