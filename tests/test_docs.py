"""Documents that must keep up with the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REQUEST_PATH = ROOT / "docs" / "request-path.md"


def strings(node: ast.AST | None) -> Iterator[str]:
    """Every string constant an expression may evaluate to: `"a"`, `found or "a"`, `"a" if x else "b"`."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.BoolOp(values=values):
            for value in values:
                yield from strings(value)
        case ast.IfExp(body=body, orelse=orelse):
            yield from strings(body)
            yield from strings(orelse)


def error_classes(trees: list[ast.Module]) -> set[str]:
    """`GatewayError` and all that inherit from it, by name, over all modules."""
    bases = {
        node.name: {base.id for base in node.bases if isinstance(base, ast.Name)}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    found = {"GatewayError"}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def codes_in(tree: ast.Module, errors: set[str], makers: set[str]) -> Iterator[str]:
    """Codes given in the body of an error class, to its constructor, to an attribute, or to a function that makes one.

    `makers` are functions with a parameter `code`, which pass it on.
    """
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name, body=body) if name in errors:
                for line in body:
                    if isinstance(line, ast.Assign | ast.AnnAssign) and "code" in _targets(line):
                        yield from strings(line.value)
            case ast.Assign(targets=[ast.Attribute(attr="code")], value=value):
                yield from strings(value)
            case ast.Call(func=ast.Name(id=called), args=arguments, keywords=keywords):
                if called in errors:
                    for keyword in keywords:
                        if keyword.arg == "code":
                            yield from strings(keyword.value)
                elif called in makers:
                    yield from (text for each in arguments for text in strings(each) if re.fullmatch("[a-z_]+", text))


def _targets(line: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = line.targets if isinstance(line, ast.Assign) else [line.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def makers_in(tree: ast.Module) -> set[str]:
    return {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any(each.arg == "code" for each in node.args.args)
    }


def error_codes() -> set[str]:
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "gateway").rglob("*.py"))]
    errors = error_classes(trees)
    return {code for tree in trees for code in codes_in(tree, errors, makers_in(tree))}


def documented(page: str) -> set[str]:
    """What stands in backquotes in the third column of the table of errors."""
    section = page.split("\n## Errors\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")]
    return {code for row in rows for code in re.findall(r"`([a-z_]+)`", row[3])}


def test_the_search_for_codes_finds_each_way_of_writing_one() -> None:
    tree = ast.parse(
        "class Late(GatewayError):\n    code = 'in_a_class'\n"
        "class Later(Late):\n    code: str = 'in_a_subclass'\n"
        "def make(status, code): return Late('x', code=code)\n"
        "def f():\n"
        "    raise Late('Words.', code=found or 'in_a_call')\n"
        "    error.code = 'in_an_attribute'\n"
        "    return make(400, 'Not this one.', 'in_a_maker')\n"
        "other(code='of_somebody_else')\n"
    )
    found = set(codes_in(tree, error_classes([tree]), makers_in(tree)))
    assert found == {"in_a_class", "in_a_subclass", "in_a_call", "in_an_attribute", "in_a_maker"}


def test_every_error_code_is_in_the_request_path_and_no_other() -> None:
    codes = error_codes()
    assert len(codes) > 30
    page = documented(REQUEST_PATH.read_text())
    assert codes - page == set(), "add these to the table of errors in docs/request-path.md"
    assert page - codes == set(), "nothing in gateway/ sends these any more"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.name)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in local if not (page.parent / target).exists()] == []


# -- docs/reliability.md: forty experiments, and no claim without its test


def experiment_rows() -> list[list[str]]:
    """The cells of the table that `tests.faults.report` writes."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    table = page.partition("<!-- results: written by tests.faults.report -->")[2].partition("<!-- /results -->")[0]
    lines = [line for line in table.splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_every_experiment_has_a_row_that_says_how_it_ended() -> None:
    rows = experiment_rows()
    assert {int(row[0]) for row in rows} >= set(range(1, 41))
    for row in rows:
        assert len(row) == 7, row
        assert row[5] in ("holds", "**fails**") or re.fullmatch(r"not run: .{8,}", row[5]), row


def test_what_is_said_to_hold_has_a_test_of_that_number() -> None:
    names = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", path.read_text())
    }
    for row in experiment_rows():
        if row[5] != "holds":
            continue
        test = row[6].strip("`")
        assert test in names, row
        assert int(row[0]) > 40 or row[0] in re.findall(r"\d+", test), row
