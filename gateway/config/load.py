"""Loading: file, environment, secrets, schema, checks across settings; and one report of all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

from gateway.config.checks import cross_check, literal_secrets
from gateway.config.environment import (
    COMMAND_LINE,
    ENVIRONMENT,
    Overrides,
    apply_command_line,
    apply_environment,
)
from gateway.config.found import Found, apply_found
from gateway.config.layer import OVERRIDE, Layer, apply_layer
from gateway.config.limit_checks import check_limits, missing_folder, needs_shared_store
from gateway.config.lines import Document, read_document
from gateway.config.problems import ConfigError, Finding, Path, Problem, did_you_mean, show_path
from gateway.config.schema import RESTART_ONLY, Settings
from gateway.config.secrets import leave_out, referenced_variables, resolve, secret_places
from gateway.config.translate import findings_of
from gateway.config.tree import is_mapping, model_of

DEFAULTS = "configuration"
"""What a problem names as its file when no file was given."""

_NO_MODELS = ("no models configured", "add at least one under models, and its backend under backends")


@dataclass(frozen=True)
class Reading:
    """Settings, and where each of them comes from."""

    settings: Settings
    document: Document
    """The file, as it was read: nothing has been put over it."""
    origins: Overrides
    unused: tuple[tuple[str, ...], ...] = ()
    """Paths of the layer that lead nowhere in this configuration."""


def load(
    path: FilePath | None,
    environ: Mapping[str, str],
    options: Mapping[str, str] | None = None,
    *,
    secrets: Collection[str] | None = None,
) -> Settings:
    """Read the configuration, or raise a `ConfigError` with everything that is wrong.

    `environ` is the process environment: overrides (`TIDEGATE_...`) and the variables that secrets refer to.
    `options` are command-line options as dotted settings (`{"server.port": "7500"}`); they win over both.
    `secrets` names those that the caller needs, such as `keys.pepper`; the others are not looked for, so that whoever
    runs a command for operators need not have all that the gateway has, and are empty. None: all of them.
    Without a path, defaults and environment alone are used, and having no models is allowed.
    """
    return read_all(path, environ, options, secrets=secrets).settings


def read_all(
    path: FilePath | None,
    environ: Mapping[str, str],
    options: Mapping[str, str] | None = None,
    *,
    secrets: Collection[str] | None = None,
    layer: Layer = (),
    document: Document | None = None,
    found: Found | None = None,
) -> Reading:
    """As `load`, with where everything comes from. `layer`: what operators have put over file and environment.
    `document`: the file as it was read before, instead of reading it now. `found`: replicas that were discovered."""
    if document is None:
        document = Document(DEFAULTS) if path is None else read_document(path)
    if not document.readable:
        raise ConfigError(document.problems)
    data = deepcopy(document.data)
    findings = list(_unknown_sections(data))
    prefix, delimiter = (
        Settings.model_config["env_prefix"],
        Settings.model_config["env_nested_delimiter"] or "__",
    )
    overrides = apply_environment(Settings, data, environ, prefix, delimiter)
    apply_command_line(Settings, data, options or {}, overrides)
    apply_found(data, found or {}, overrides)
    unused = apply_layer(data, layer, overrides)

    places = list(secret_places(Settings, data))
    mentioned = referenced_variables(places)
    if secrets is not None:
        places = leave_out(places, secrets)
    folder = FilePath() if path is None else path.parent
    findings += resolve(places, environ, folder, overrides.from_environment)

    settings = _validated(data, findings)
    findings += [*literal_secrets(data), *cross_check(data), *check_limits(data)]
    if path is not None and not data.get("models"):
        findings.append(Finding(("models",), *_NO_MODELS))

    problems = document.problems + _placed(findings, document, overrides)
    problems += [problem for name, problem in overrides.problems.items() if name not in mentioned]
    if settings is None or problems:
        raise ConfigError(sorted(set(problems), key=_order))
    return Reading(settings, document, overrides, tuple(unused))


def require_models(settings: Settings, file: str = DEFAULTS) -> None:
    """Refuse to serve a configuration in which there is nothing to serve."""
    if not settings.models:
        raise ConfigError([Problem(file, None, "models", *_NO_MODELS)])


def json_schema() -> dict[str, Any]:
    """The JSON Schema of the file, for editors that complete and check it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Settings.model_json_schema(mode="validation"),
        "title": "Tidegate configuration",
        "description": "The file given to tidegate serve --config.",
    }


def require_shared_store(settings: Settings, file: str, workers: int) -> None:
    """Raise a `ConfigError` if several workers would each count for themselves."""
    place = needs_shared_store(settings)
    if place is not None:
        raise ConfigError(
            [
                Problem(
                    file,
                    None,
                    "store",
                    f"{workers} workers with store: memory would each keep limits of their own, and {place} asks for "
                    "exact ones",
                    "set store: redis://host:port, or serve with one worker",
                )
            ]
        )


def require_database_folder(settings: Settings, file: str) -> None:
    """Raise a `ConfigError` if the database cannot be where it is to be. For a start: a reload keeps what it has."""
    folder = missing_folder(settings)
    if folder is not None:
        said = f"there is no directory {folder}"
        raise ConfigError([Problem(file, None, "database", said, "make it, or name a file in another one")])


def restart_only_changes(old: Settings, new: Settings) -> list[str]:
    """The settings that differ but only take effect after a restart, such as `server.port`."""
    changed: list[str] = []
    for root in RESTART_ONLY:
        before, after = _at(old, root), _at(new, root)
        if isinstance(before, BaseModel):
            fields = type(before).model_fields
            changed += [f"{root}.{name}" for name in fields if getattr(before, name) != getattr(after, name)]
        elif before != after:
            changed.append(root)
    if old.keys.pepper != new.keys.pepper:
        changed.append("keys.pepper")
    return changed


def keep_restart_only(old: Settings, new: Settings) -> Settings:
    """`new`, with everything that needs a restart as `old` has it."""
    kept: dict[str, Any] = {name: getattr(old, name) for name in RESTART_ONLY}
    kept["keys"] = new.keys.model_copy(update={"pepper": old.keys.pepper})
    return new.model_copy(update=kept)


def _at(settings: Settings, path: str) -> Any:
    value: Any = settings
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _unknown_sections(data: dict[str, Any]) -> Iterator[Finding]:
    """Take unknown keys off the top, where pydantic-settings would read some as options of its own.

    A section with nothing in it (all its lines commented out) means its defaults.
    """
    fields = Settings.model_fields
    for key in list(data):
        if key not in fields:
            del data[key]
            yield Finding((key,), "is not a known setting", did_you_mean(key, fields))
        elif data[key] is None and (model_of(fields[key].annotation) or is_mapping(fields[key].annotation)):
            del data[key]


def _validated(data: dict[str, Any], findings: list[Finding]) -> Settings | None:
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        findings += findings_of(error)
        return None


def _placed(findings: list[Finding], document: Document, overrides: Overrides) -> list[Problem]:
    """Say for each finding whether the file, a variable or the command line is to blame."""
    problems = []
    seen: set[tuple[Path, str]] = set()
    for finding in findings:
        if (finding.path, finding.message) in seen:
            continue
        seen.add((finding.path, finding.message))
        origin = overrides.origin_of(finding.path)
        where = show_path(finding.path)
        if origin is None:
            line = document.line_of(finding.path)
            problems.append(Problem(document.file, line, where, finding.message, finding.hint))
        else:
            source, name = origin
            message = f"{name}: {finding.message}" if name else finding.message
            problems.append(Problem(source, None, where, message, finding.hint))
    return problems


def _order(problem: Problem) -> tuple[int, int, str, str]:
    """By line, then what no line is known of; the environment and the command line last."""
    late = {ENVIRONMENT: 1, COMMAND_LINE: 2, OVERRIDE: 3}.get(problem.file, 0)
    return (late, problem.line or 0, problem.path, problem.message)
