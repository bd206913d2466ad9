"""The models that the plan knows by name, and how any other is read from a `config.json`.

The configurations of known models lie beside this module, under models/, with the address they were read from and the
published totals; a test compares those with the sums, which proves the dimensions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from backends.plan.architecture import Model, read_model
from backends.plan.errors import PlanError

INDEX = "model.safetensors.index.json"
_LARGEST_FILE = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What the authors say: totals in units of 10^9, and where."""

    total_b: float
    active_b: float | None
    active_counts_embedding: bool
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A model, by whatever way it was found."""

    name: str  # short: of a file the folder's
    hub: str  # what an engine is told: a hub's name or a path
    config: Mapping[str, Any]
    aliases: tuple[str, ...] = ()
    variants: Mapping[str, tuple[str, Mapping[str, Any]]]
    """For a precision the checkpoint on the hub that has it, and where its config.json differs."""
    published: Published | None = None
    checkpoint_bytes: int | None = None
    source: str  # where the configuration was read

    @property
    def model(self) -> Model:
        """Its dimensions. Raises `PlanError` where the configuration is not understood."""
        return read_model(self.config)

    def in_precision(self, precision: str | None) -> tuple[Model, str, str, bool]:
        """Model, precision, checkpoint, and whether the checkpoint has this precision (else an engine must make it)."""
        model = self.model
        if precision is None or precision == model.native:
            return model, model.native, self.hub, True
        if precision in self.variants:
            hub, changed = self.variants[precision]
            return read_model({**self.config, **changed}), precision, hub, True
        return model, precision, self.hub, {precision, model.native} <= {"bf16", "fp16"}


def known_models() -> tuple[Known, ...]:
    """All known by name, in the order of their files."""
    return tuple(_read_known())


def _read_known() -> Iterator[Known]:
    folder = resources.files("backends.plan") / "models"
    for file in sorted(folder.iterdir(), key=lambda each: each.name):
        if not file.name.endswith(".json"):
            continue
        for entry in json.loads(file.read_text(encoding="utf-8"))["models"]:
            variants = {
                precision: (found["hub"], found.get("config", {}))
                for precision, found in entry.get("variants", {}).items()
            }
            yield Known(
                name=entry["name"],
                hub=entry["hub"],
                config=entry["config"],
                aliases=tuple(entry["aliases"]),
                variants=variants,
                published=Published(**entry["published"]),
                source=entry["config_source"],
            )


def find(name: str) -> Known:
    """A known model by name, alias or hub name, or the one at a path.

    Raises `PlanError` naming what is near, or what is wrong with the file.
    """
    wanted = name.lower()
    every = known_models()
    for known in every:
        if wanted in (known.name, known.hub.lower(), *(alias.lower() for alias in known.aliases)):
            return known
        # Another checkpoint of a known model, on the hub under its own name.
        for precision, (hub, changed) in known.variants.items():
            if wanted == hub.lower():
                return _variant(known, precision, hub, changed)
    path = Path(name).expanduser()
    if path.exists():
        return read_path(path)
    near = [known.name for known in every if wanted.split("/")[-1][:6] in known.name]
    raise PlanError(
        f"{name!r} is neither a known model nor a path; "
        + (f"near are {', '.join(near)}; " if near else "")
        + "give the path of its config.json, or --list shows what is known"
    )


def _variant(known: Known, precision: str, hub: str, changed: Mapping[str, Any]) -> Known:
    config = {**known.config, **changed}
    if read_model(config).native != precision:
        raise PlanError(f"{hub}: ask for {known.name} with precision {precision}")
    return Known(
        name=f"{known.name}-{precision}",
        hub=hub,
        config=config,
        variants={},
        source=f"https://huggingface.co/{hub}/blob/main/config.json",
    )


def read_path(path: Path) -> Known:
    """The model of a `config.json`, or of a folder with one. An index of weights beside it gives their true size."""
    file = path / "config.json" if path.is_dir() else path
    config = _object(file)
    folder = file.resolve().parent
    index = folder / INDEX
    size: int | None = None
    if index.exists():
        metadata = _object(index).get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, Mapping) else None
        if not isinstance(size, int) or isinstance(size, bool) or size <= 0:
            raise PlanError(f"{index}: metadata.total_size: not a number of bytes")
    return Known(
        name=folder.name or "model",
        hub=str(folder),
        config=config,
        variants={},
        checkpoint_bytes=size,
        source=str(file),
    )


def _object(file: Path) -> Mapping[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise PlanError(f"{file}: larger than {_LARGEST_FILE >> 20} MiB")
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{file}: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise PlanError(f"{file}: not an object")
    return found
