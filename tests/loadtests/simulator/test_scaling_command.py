"""What docs/scaling.md claims, on parts of the days that it is claimed of, and the command that writes it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from loadtests.simulator import command as simulate
from loadtests.simulator.scaling import plots, tables
from loadtests.simulator.scaling.arrivals import courses
from loadtests.simulator.scaling.command import main
from loadtests.simulator.scaling.deciders import deciders
from loadtests.simulator.scaling.run import Figures, Run, run

MORNING = {"course": "diurnal", "hours": 7.0, "begin_h": 6.0}


@pytest.fixture(scope="module")
def morning() -> dict[str, Figures]:
    return {name: run(Run(decider=name, **MORNING)) for name in deciders()}  # type: ignore[arg-type]


def test_the_target_is_kept_over_a_morning(morning: dict[str, Figures]) -> None:
    assert morning["tidegate"].within > 0.98
    assert morning["tidegate"].late_minutes <= 20  # it has just begun, and knows no full replica yet


def test_it_costs_less_than_a_fleet_for_the_peak_and_no_less_than_an_oracle(morning: dict[str, Figures]) -> None:
    ours, oracle = morning["tidegate"].usd, morning["oracle"].usd
    assert ours < 0.85 * morning["static, peak"].usd
    assert oracle <= ours < 1.4 * oracle


def test_it_changes_less_often_and_is_late_less_often_than_others(morning: dict[str, Figures]) -> None:
    for other in ("HPA", "KEDA", "Knative"):
        assert morning["tidegate"].changes < 0.5 * morning[other].changes
        assert morning["tidegate"].late_minutes < morning[other].late_minutes


def test_a_step_of_fifty_times_is_not_kept_without_a_floor_or_spill() -> None:
    spike = {"course": "viral at once", "decider": "tidegate", "hours": 0.75, "begin_h": 5.75}
    bare = run(Run(**spike))  # type: ignore[arg-type]
    spilling = run(Run(spill=True, **spike))  # type: ignore[arg-type]
    ready = run(Run(floor=28, **spike))  # type: ignore[arg-type]
    assert bare.within < 0.9
    assert bare.left_share > 0.05
    assert spilling.within > bare.within + 0.1
    assert (spilling.left_share, spilling.rented_share > 0.05) == (0.0, True)
    assert ready.within > 0.99


def test_after_a_restart_what_was_learned_is_worth_late_minutes_and_without_it_they_come_back() -> None:
    """Minutes after a step, with replicas ordered for it: who has learned nothing takes them for too many."""
    step = {"course": "viral at once", "decider": "tidegate", "hours": 1.0, "begin_h": 5.5, "count_from_h": 0.7}
    late: dict[str, float] = {}
    for restart in ("", "with", "without"):
        found = [run(Run(seed=seed, restart=restart, **step)) for seed in (1, 2, 3)]  # type: ignore[arg-type]
        late[restart] = sum(each.late_minutes for each in found)
    assert late["with"] <= late[""] + 1
    assert late["without"] > late["with"]


def test_only_the_one_that_keeps_something_is_started_again() -> None:
    with pytest.raises(ValueError, match="only tidegate"):
        run(Run("growth", "HPA", hours=0.2, count_from_h=0.1, restart="with"))


def test_runs_with_equal_seeds_are_equal() -> None:
    what = Run("sawtooth", "tidegate", 4, hours=0.5)
    assert run(what) == run(what)
    assert run(what) != run(Run("sawtooth", "tidegate", 5, hours=0.5))


def test_the_command_prints_a_line_for_each_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scaling", "--courses", "sawtooth,growth", "--deciders", "tidegate;static, mean", "--hours", "0.2"]
    assert simulate.main([*words, "--seeds", "2", "--processes", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("within")[0].split() for line in lines] == [
        ["sawtooth", "tidegate"],
        ["sawtooth", "static,", "mean"],
        ["growth", "tidegate"],
        ["growth", "static,", "mean"],
    ]
    shown = {"tidegate": run(Run("sawtooth", "tidegate", hours=0.5, sample=True))}
    plots.draw(tmp_path / "it.svg", "a <title>", shown)
    assert ElementTree.parse(tmp_path / "it.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--courses", "nothing"], "no course is called 'nothing'; there are diurnal, "),
        (["--deciders", "fate"], "no decider is called 'fate'"),
        (["--engine", "steam"], "no engine is called 'steam'"),
        (["--hours", "1", "--write", "x.md"], "--write takes all courses"),
    ],
)
def test_what_is_not_said_rightly_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_tables_are_written_between_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}old\n{tables.END}\nafter\n")
    days = {each: run(each) for each in (Run("growth", "tidegate", hours=0.1), Run("growth", "oracle", hours=0.1))}
    tables.write(page, tables.page(days, days))
    restarts = {
        each: run(each)
        for each in (
            Run("growth", "tidegate", hours=0.2, count_from_h=0.1, restart=restart)
            for restart in ("", "with", "without")
        )
    }
    text = tables.page(days, days, restarts)
    assert "| growth, hour 0.1 | with what it learned | 100.00% ± 0.00 | 0.0 |" in text
    text = page.read_text()
    assert "| tidegate | 100.00% ± 0.00 |" in text
    assert "old" not in text
    assert text.endswith(f"{tables.END}\nafter\n")
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no place marked"):
        tables.write(page, "")


def test_the_page_has_a_table_for_every_course_and_its_pictures() -> None:
    root = Path(__file__).resolve().parents[3]
    text = (root / "docs" / "scaling.md").read_text()
    for name, course in courses().items():
        assert f"#### {name}: {course.text}" in text
    for picture in ("diurnal", "viral", "viral-at-once"):
        assert f"images/scaling-{picture}.svg" in text
        assert (root / "docs" / "images" / f"scaling-{picture}.svg").stat().st_size < 60_000
