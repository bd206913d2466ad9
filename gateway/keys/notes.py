"""What an operator is told beside a command's answer: what may be stored, but may not be what was meant.

Held against the configuration that the command was given, which may be older or newer than a gateway's: nothing of this
is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from gateway.config.limits import DEFAULT_TENANT
from gateway.config.problems import did_you_mean
from gateway.keys.rules import listed

if TYPE_CHECKING:
    from gateway.config import Settings
    from gateway.keys.issuing import Office

MAX_NAMED = 5
_BUDGETS = ("usd_per_day=", "usd_per_month=")


def notes(options: argparse.Namespace, settings: Settings, office: Office) -> Iterator[str]:
    """Each as a sentence. Asked before the command is carried out. Raises `BadValue`, `UnknownName`."""
    if options.config is None and not settings.models:
        return
    file = str(options.config or "the environment")
    if options.command == "tenants":
        if options.action in ("set", "raise"):
            yield from _tenant("TENANT", options.tenant, settings, office, file)
            yield from _money_of_tenant(options, settings, file)
        return
    if options.action not in ("create", "update", "raise"):
        return
    if options.action != "raise":
        if settings.auth == "insecure":
            yield f"{file} has auth: insecure: its gateway asks nobody for a key; write auth: keys"
        yield from _rights(options, settings, file)
    if options.action == "create":
        yield from _tenant("--tenant", options.tenant, settings, office, file)
    yield from _money_of_key(options, settings, office, file)


def _rights(options: argparse.Namespace, settings: Settings, file: str) -> Iterator[str]:
    yield from _models("--models", listed("models", options.models) or (), settings, file)
    replicas = [replica for pool in settings.backends.values() for replica in pool.replicas]
    regions = {replica.region for replica in replicas if replica.region is not None}
    for region in listed("regions", options.regions) or ():
        if region not in regions:
            yield _and(f"--regions: no replica in {file} is in the region {region!r}", did_you_mean(region, regions))
    adapters = {adapter.name for pool in settings.backends.values() for adapter in pool.adapters}
    for adapter in listed("adapters", options.adapters) or ():
        if adapters and adapter not in adapters:  # without any, the engines load them by themselves
            yield _and(f"--adapters: {file} has no adapter {adapter!r}", did_you_mean(adapter, adapters))


def _models(flag: str, names: Collection[str], settings: Settings, file: str) -> Iterator[str]:
    aliases = {alias: name for name, model in settings.models.items() for alias in model.aliases}
    for model in names:
        if model in aliases:
            yield f"{flag}: {model!r} is an alias in {file}: write the model's name, {aliases[model]!r}"
        elif model not in settings.models:
            yield _and(f"{flag}: {file} has no model {model!r}", did_you_mean(model, settings.models))


def _tenant(flag: str, tenant: str, settings: Settings, office: Office, file: str) -> Iterator[str]:
    if not settings.tenants:  # then they are only known to the database, where the first key makes them
        return
    known = {DEFAULT_TENANT, *settings.tenants, *(record.name for record in office.tenants())}
    if tenant not in known:
        said = f"{flag}: neither {file} nor the database knows a tenant {tenant!r}"
        yield _and(said, did_you_mean(tenant, known - {DEFAULT_TENANT}))


def _money_of_key(options: argparse.Namespace, settings: Settings, office: Office, file: str) -> Iterator[str]:
    models = listed("models", options.models) if options.action != "raise" else None
    budget = _has_budget(options.limits)
    if options.action != "create":
        before = office.key(options.id)
        if options.action == "raise" or options.models is None:
            models = None if before.models is None else list(before.models)
        elif options.limits is None:
            budget = before.limits.usd_per_day is not None or before.limits.usd_per_month is not None
    if budget:
        yield from _unpriced("--limit", models, settings, file)


def _money_of_tenant(options: argparse.Namespace, settings: Settings, file: str) -> Iterator[str]:
    by_model = [each.partition("=")[0].rpartition(":") for each in getattr(options, "model_limits", None) or ()]
    names = list(dict.fromkeys(model for model, _, _ in by_model if model))
    yield from _models("--model-limit", names, settings, file)
    if _has_budget(options.limits):
        yield from _unpriced("--limit", None, settings, file)
    if _has_budget(getattr(options, "user_limits", None)):
        yield from _unpriced("--user-limit", None, settings, file)
    bounded = [
        model
        for model in names
        if _has_budget([each[len(model) + 1 :] for each in options.model_limits if each.startswith(f"{model}:")])
    ]
    if bounded:
        yield from _unpriced("--model-limit", bounded, settings, file)


def _has_budget(texts: Sequence[str] | None) -> bool:
    return any(text.startswith(_BUDGETS) and text.partition("=")[2].lower() != "none" for text in texts or ())


def _unpriced(flag: str, models: Collection[str] | None, settings: Settings, file: str) -> Iterator[str]:
    """A budget only counts what has a price; `models` None: all."""
    free = [
        name for name, model in settings.models.items() if model.price is None and (models is None or name in models)
    ]
    if free:
        named = ", ".join(map(repr, free[:MAX_NAMED])) + (", ..." if len(free) > MAX_NAMED else "")
        yield (
            f"{flag}: {file} has no price for {named}, so a budget cannot be counted there: such requests are refused "
            "(403 model_without_price); give each a price (zeros for your own hardware)"
        )


def _and(said: str, hint: str) -> str:
    return f"{said}; {hint}" if hint else said
