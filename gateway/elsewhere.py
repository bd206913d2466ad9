"""A model's route at another pool than its own, as spills and fallbacks take it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from gateway.config import Price, Settings
from gateway.fleet import ModelRoute, Pool, rates
from gateway.relay import Timing
from routing.policies import make_policy
from routing.router import Router


def route_at(
    home: ModelRoute,
    pool: Pool,
    settings: Settings,
    upstream_model: str | None,
    price: Price | None,
    before: ModelRoute | None,
) -> ModelRoute:
    """The route `home` led to this pool: by the pool's timeouts, where the model has none of its own, and its total.

    `upstream_model` and `price` None: the model's own. `before`: the same route as it was made last, for what its
    router has learned.
    """
    model = settings.models[home.model]
    own = {name: value for name, value in model.timeouts if value is not None}
    timeouts = pool.settings.timeouts.model_copy(update=own)
    router = home.router
    if isinstance(router, Router):
        kept = None if before is None or before.policy != home.policy else before.router
        same = isinstance(kept, Router) and kept.state is pool.routing
        router = kept if same and kept is not None else Router(make_policy(home.policy, Random()), pool.routing)
    return replace(
        home,
        pool=pool,
        upstream_model=upstream_model or home.upstream_model,
        timing=Timing(
            first_token_s=timeouts.first_token_s,
            idle_s=timeouts.idle_s,
            total_s=home.timing.total_s,
            hold_s=home.timing.hold_s,
            heartbeat_s=home.timing.heartbeat_s,
        ),
        connect_s=timeouts.connect_s,
        price=home.price if price is None else price,
        router=router,
        ms_per_usd=rates(model.ms_per_usd, pool),
        hedges=None,  # what was learned of the model's own replicas says nothing of these
    )
