"""`tidegate simulate`, and the tables: what is run, kept, and said."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from gateway import cli
from loadtests.simulator import tables
from loadtests.simulator.document import Change, document, gateways_table, missed_against_rival
from loadtests.simulator.metrics import difference, interval
from loadtests.simulator.runner import Cell, Store, code_of, run_all
from loadtests.simulator.scenarios import GENERATED

SMALL = ["--size", "60", "--replicas", "2", "--seeds", "2", "--processes", "1"]


def simulate(folder: Path, *arguments: str) -> int:
    return cli.main(["simulate", *arguments, *SMALL, "--store", str(folder / "store.json")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one store for all, since finding a capacity is what takes longest."""
    return tmp_path_factory.mktemp("simulated")


def test_policies_are_compared_and_every_figure_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    done = simulate(folder, "--workload", "distinct", "--policies", "cost,round_robin", "--json", str(out))
    assert done == 0
    said = capsys.readouterr().out
    assert "at 95% of capacity" in said
    assert "round_robin" in said
    rows = json.loads(out.read_text())
    assert [(row["policy"], row["seed"]) for row in rows] == [
        ("cost", 1),
        ("round_robin", 1),
        ("cost", 2),
        ("round_robin", 2),
    ]
    assert all(row["ttft_ms"] > 0.0 and row["failed"] == 0.0 for row in rows)


def test_a_trace_of_ones_own_is_run_with_several_gateways_at_two_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "mine.jsonl"
    rows = [
        {"timestamp": 100 * each, "input_length": 600, "output_length": 20, "hash_ids": [each % 7, 100 + each]}
        for each in range(60)
    ]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    options = ["--policies", "cost", "--gateways", "3", "--load", "0.5,0.9", "--usd-per-hour", "2.5"]
    assert simulate(tmp_path, "--trace", str(trace), *options) == 0
    said = capsys.readouterr().out
    assert "at 50% of capacity" in said
    assert "at 90% of capacity" in said


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workload", "nothing"], "no workload is called 'nothing'"),
        (["--workload", "distinct", "--policies", "best"], "best"),
        (["--workload", "distinct", "--engine", "abacus"], "no engine is called 'abacus'"),
        (["--trace", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert simulate(tmp_path, *arguments) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "store.json").exists()


@pytest.mark.parametrize("load", ["0", "much", "", "0.5,-1"])
def test_a_load_is_a_share_of_the_capacity(tmp_path: Path, capsys: pytest.CaptureFixture[str], load: str) -> None:
    with pytest.raises(SystemExit):
        simulate(tmp_path, "--workload", "distinct", "--load", load)
    assert "share" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--replicas", "--seeds", "--size", "--gateways", "--processes"])
@pytest.mark.parametrize("number", ["0", "-3", "1.5", "many", "9" * 5000])
def test_there_is_one_of_everything_at_least(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, number: str
) -> None:
    with pytest.raises(SystemExit):
        simulate(tmp_path, "--workload", "distinct", option, number)
    assert "is not a whole number above 0" in capsys.readouterr().err


def test_a_trace_of_a_single_moment_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "one.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 100, "output_length": 5, "hash_ids": [1]}\n' * 2)
    assert simulate(tmp_path, "--trace", str(trace)) == 2
    assert "no two requests at different times" in capsys.readouterr().err


def test_a_plot_is_drawn_for_one_load_and_for_several(folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is optional")
    for loads in ("0.8", "0.5,0.8"):
        picture = tmp_path / f"{loads}.png"
        options = ["--workload", "distinct", "--policies", "cost,random", "--load", loads, "--plot", str(picture)]
        assert simulate(folder, *options) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_anything_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert simulate(tmp_path, "--workload", "distinct", "--plot", str(tmp_path / "out.png")) == 2
    assert "tidegate[plots]" in capsys.readouterr().err
    assert not (tmp_path / "store.json").exists()


def test_without_the_simulator_the_command_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "loadtests.simulator", None)
    assert cli.main(["simulate", "--workload", "chats"]) == 1
    assert "not installed here" in capsys.readouterr().err


def test_what_was_run_is_kept_until_the_code_changes(tmp_path: Path) -> None:
    cell = Cell("distinct", 0.5, 1, "random", 60, replicas=1)
    store = Store(tmp_path / "store.json")
    said: list[str] = []
    first = run_all([cell], store, processes=1, tell=said.append)
    assert len(said) == 2, "the capacity, and the run"
    assert run_all([cell], Store(store.path), processes=1, tell=said.append) == first
    assert len(said) == 2
    rows = json.loads(store.path.read_text())
    rows[cell.key]["code"] = "of yesterday"
    store.path.write_text(json.dumps(rows))
    run_all([cell], Store(store.path), processes=1, tell=said.append)
    assert len(said) == 3, "run again, at the capacity that is still known"


def test_a_policy_of_ones_own_is_run_again_once_it_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "edited_policies"
    package.mkdir()
    (package / "__init__.py").touch()
    helper, policy = package / "helper.py", package / "policy.py"
    helper.write_text("")
    policy.write_text(
        "from edited_policies.helper import *\ndef first(request, candidates, view):\n    return candidates[0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    codes = {code_of("edited_policies.policy:first")}
    for path in (policy, helper):
        path.write_text(path.read_text() + "# another\n")
        codes.add(code_of("edited_policies.policy:first"))
    assert len(codes) == 3


def test_a_policy_is_not_run_again_for_another_ones_code() -> None:
    assert code_of("cost") != code_of("lmetric")
    assert code_of("lmetric") == code_of("dynamo")


def test_the_tables_are_written_between_their_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "routing.md"
    page.write_text(f"before\n{tables.BEGIN}\nof yesterday\n{tables.END}\nafter\n")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(tables, "GATEWAYS", (1, 2))
    options = [
        "--quick",
        "--write",
        "--workloads",
        "chats",
        "--size",
        "60",
        "--seeds",
        "2",
        "--processes",
        "1",
        "--replicas",
        "1",
    ]
    assert tables.main([*options, "--loads", "0.5", "--store", str(tmp_path / "store.json")]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{tables.BEGIN}\n")
    assert text.endswith(f"{tables.END}\nafter\n")
    assert "of yesterday" not in text
    assert "| chats | 50% |" in text
    assert "### Many gateways" in text
    assert (tmp_path / "routing-ttft.png").exists()
    assert "cost to lmetric" in capsys.readouterr().out


def test_the_goals_that_were_missed_are_named() -> None:
    near, behind, ahead = Change(0.01, 0.02), Change(0.1, 0.02), Change(-0.08, 0.01)
    assert missed_against_rival(near, near, differs=False) == []
    assert missed_against_rival(behind, behind, differs=False) == ["p99 TTFT", "end-to-end"]
    assert missed_against_rival(near, near, differs=True) == ["end-to-end 5 % ahead"]
    assert missed_against_rival(ahead, ahead, differs=True) == []

    def row(ttft_ms: float, total_ms: float) -> dict[str, float]:
        rest = dict.fromkeys(("hit_rate", "prediction_error", "decide_us"), 0.1)
        return {"ttft_ms": ttft_ms, "ttft_p99_ms": ttft_ms, "total_ms": total_ms, "per_s": 1.0, **rest}

    found = {
        Cell("distinct", 0.8, seed, policy, 10): row(ttft, 1000.0)
        for seed in (1, 2)
        for policy, ttft in (("cost", 104.0), ("lmetric", 103.9), ("ttft", 100.0))
    }
    text = document(found, GENERATED, 2)
    assert "| distinct | 80% | +4.0% ± 0.0% | ttft |" not in text, "equal pairs have no width"
    assert "| distinct | 80% | +4.0% | ttft | +0.1% | +0.1% | +0.0% | mean TTFT |" in text
    assert "| distinct | 104 / 0.10 |" in gateways_table({cell: found[cell] for cell in list(found)[:1]}, (1,))


def test_differences_are_taken_pair_by_pair() -> None:
    # Worked by hand: ratios 0.1 and 0.2; t(1) = 12.706, standard error 0.05.
    by, half = difference([110.0, 240.0], [100.0, 200.0])
    assert by == pytest.approx(0.15)
    assert half == pytest.approx(12.706 * 0.05)
    assert interval([1.0]) == 0.0
