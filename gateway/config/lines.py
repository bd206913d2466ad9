"""Reading the YAML file: its values, the line of each, and what YAML itself would let pass in silence.

PyYAML keeps the last of two equal keys without a word. Here both are seen, because lines and duplicates are
read from the node tree that precedes the values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from gateway.config.problems import Path, Problem, show_path, shown

_TEXT = "tag:yaml.org,2002:str"
MAX_VALUES = 200_000
"""Values a file may have. Ten lines of aliases of aliases stand for billions, and would keep a reload busy for ever."""
_MERGE = "tag:yaml.org,2002:merge"


@dataclass
class Document:
    """What a file says, and on which line it says it."""

    file: str
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    readable: bool = True
    """False when nothing could be read at all, so that looking for further problems makes no sense."""

    def line_of(self, path: Path) -> int | None:
        """The line of a setting, or of the closest thing around it that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def add(self, line: int | None, path: Path, message: str, hint: str = "") -> None:
        self.problems.append(Problem(self.file, line, show_path(path), message, hint))


def read_document(path: FilePath) -> Document:
    """Read a file; whatever is wrong with it ends up in the document's problems."""
    document = Document(str(path))
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        document.add(line, (), "the file is not UTF-8 text", "save it as UTF-8")
    except FileNotFoundError:
        document.add(None, (), "there is no such file", "check the path given with --config")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a usable path"
        document.add(None, (), f"the file cannot be read: {reason}", "check the path and its permissions")
    else:
        return parse(document, text.removeprefix("\N{BYTE ORDER MARK}"))
    document.readable = False
    return document


def parse(document: Document, text: str) -> Document:
    """Fill a document from YAML text."""
    try:
        _parse(document, text)
    except yaml.reader.ReaderError as error:
        position = text[: error.position].count("\n") + 1
        document.add(position, (), "not valid YAML: a character that YAML does not allow", "remove it, or escape it")
        document.readable = False
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        document.add(line, (), f"not valid YAML: {_reason(error)}", "correct this line or the one before")
        document.readable = False
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a value cannot be read"
        document.add(None, (), f"not valid YAML: {reason}", "put quotes around dates and the like")
        document.readable = False
    return document


def _reason(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's short reason, without the line, alias or tag that it quotes: it may be a pasted secret."""
    reason = error.problem or "it cannot be read"
    if "undefined alias" in reason:
        return "a word beginning with * refers to nothing; put quotes around it"
    if "constructor for the tag" in reason:
        return "a word beginning with ! is not supported; put quotes around it"
    return reason


def _parse(document: Document, text: str) -> None:
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            line = node.start_mark.line + 1
            document.add(line, (), "the file is not a mapping of settings", "write e.g. server: {port: 7400}")
            document.readable = False
            return
        if _expanded(node, {}) > MAX_VALUES:
            problem = f"aliases (*) multiply it to more than {MAX_VALUES:,} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        _check_keys(document, node, (), [])
        data = _unshared(loader.construct_document(node))
        if not isinstance(data, dict):
            raise yaml.MarkedYAMLError(problem="it is not a mapping of settings", problem_mark=node.start_mark)
        document.data = data
        # After construction, merge keys (<<) have been replaced by what they stand for.
        document.lines[()] = 1
        _note_lines(document, node, ())
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many values there are once every alias stands for a copy. `sizes` keeps what is known, by node identity."""
    size = sizes.get(id(node))
    if size is None:
        sizes[id(node)] = 0  # met again inside itself: reported later, as an alias that contains itself
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        size = sizes[id(node)] = 1 + sum(_expanded(part, sizes) for part in below)
    return size


def _unshared(value: Any) -> Any:
    """A copy in which aliases (*) stand for values of their own, so that changing one leaves the others."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item) for item in value]
    return value


def _check_keys(document: Document, node: yaml.Node, path: Path, around: list[yaml.Node]) -> None:
    """Report duplicate and non-text keys and drop them, so that the rest can still be checked."""
    if any(node is outer for outer in around):
        raise yaml.MarkedYAMLError(problem="an alias that contains itself", problem_mark=node.start_mark)
    around = [*around, node]
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check_keys(document, item, (*path, index), around)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    kept = []
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == _MERGE:
            kept.append((key, value))
            _check_keys(document, value, path, around)
            continue
        if not isinstance(key, yaml.ScalarNode) or key.tag != _TEXT:
            said = shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            document.add(line, path, f"{said} as a key is not text", "put quotes around the key")
            continue
        if key.value in first:
            message = f"the key is given twice, first on line {first[key.value]}"
            document.add(line, (*path, key.value), message, "keep one of them")
            continue
        first[key.value] = line
        kept.append((key, value))
        _check_keys(document, value, (*path, key.value), around)
    node.value = kept


def _note_lines(document: Document, node: yaml.Node, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            document.lines[(*path, key.value)] = key.start_mark.line + 1
            _note_lines(document, value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.lines[(*path, index)] = item.start_mark.line + 1
            _note_lines(document, item, (*path, index))
