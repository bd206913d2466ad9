"""`KubernetesSource` against an API server on a real socket, on its good and bad days."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from backends.discovery.kubernetes import KubernetesSource, Timing
from backends.discovery.member import Member
from backends.kubernetes.client import Access
from backends.kubernetes.slices import Wanted
from backends.kubernetes.threads import NAME
from tests.support.kubernetes_api import Answer, KubernetesApi, endpoint, endpoint_slice, kubeconfig, kubernetes_api
from tests.support.redis_tls import make_certificates

PATIENCE_S = 20.0
QUICK = Timing(first_retry_s=0.02, last_retry_s=0.2, settled_s=0.5, gather_s=0.0)


class Told:
    """What a source said."""

    def __init__(self) -> None:
        self.members: list[list[Member]] = []
        self.troubles: list[str] = []
        self._news = asyncio.Event()

    def tell(self, members: Sequence[Member]) -> None:
        self.members.append(list(members))
        self._news.set()

    def trouble(self, text: str) -> None:
        self.troubles.append(text)
        self._news.set()

    @property
    def states(self) -> dict[str, str]:
        return {one.name: one.state for one in self.members[-1]} if self.members else {}

    async def until(self, true: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not true():
                self._news.clear()
                await self._news.wait()

    async def until_states(self, **states: str) -> None:
        try:
            await self.until(lambda: self.states == states)
        except TimeoutError:
            pytest.fail(f"told {self.states} instead of {states}; troubles: {self.troubles}")


def threads_left() -> int:
    """Of the source's. One that has handed its outcome over still needs a moment to end."""
    threads = [one for one in threading.enumerate() if one.name == NAME]
    for one in threads:
        one.join(timeout=0.5)
    return sum(one.is_alive() for one in threads)


@asynccontextmanager
async def running(
    access: Access, wanted: Wanted | None = None, timing: Timing = QUICK, environ: dict[str, str] | None = None
) -> AsyncIterator[Told]:
    """A source that runs while the block does, and leaves no thread behind."""
    told = Told()
    source = KubernetesSource(
        access, wanted or Wanted(service="sglang", labels={}), timing=timing, rng=Random(1), environ=environ
    )
    task = asyncio.create_task(source.run(told.tell, told.trouble))
    try:
        yield told
    finally:
        assert not task.done(), task.exception()
        task.cancel()
        await asyncio.wait({task}, timeout=PATIENCE_S)
        assert task.cancelled()
        assert threads_left() == 0


@pytest.fixture
async def api() -> AsyncIterator[KubernetesApi]:
    async with kubernetes_api() as running_api:
        yield running_api


@pytest.fixture
def access(api: KubernetesApi, tmp_path: Path) -> Access:
    return Access(kubeconfig=kubeconfig(api, tmp_path))


async def test_what_is_there_and_what_changes_is_told(api: KubernetesApi, access: Access) -> None:
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    await api.put(endpoint_slice("other-a", [endpoint("10.0.9.9", "stranger")], service="other"))
    async with running(access) as told:
        await told.until_states(**{"pod-1": "ready"})
        assert told.members[-1][0].url == "http://10.0.0.1:30000"
        await api.until_watches()
        await api.put(endpoint_slice("sglang-b", [endpoint("10.0.0.2", "pod-2", ready=False, serving=False)]))
        await told.until_states(**{"pod-1": "ready", "pod-2": "starting"})
        await api.put(
            endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1", ready=False, serving=True, terminating=True)])
        )
        await api.put(endpoint_slice("sglang-b", [endpoint("10.0.0.2", "pod-2")]))
        await told.until_states(**{"pod-1": "draining", "pod-2": "ready"})
        await api.remove("sglang-a")
        await told.until_states(**{"pod-2": "ready"})
    assert told.troubles == []
    assert {(one.verb, one.group, one.resource, one.namespace) for one in api.calls} == {
        ("list", "discovery.k8s.io", "endpointslices", "models"),
        ("watch", "discovery.k8s.io", "endpointslices", "models"),
    }
    assert {one["labelSelector"] for one in api.queries} == {"kubernetes.io/service-name=sglang"}


async def test_all_pages_of_a_list_are_read(api: KubernetesApi, access: Access) -> None:
    api.page = 2
    for number in range(5):
        await api.put(endpoint_slice(f"sglang-{number}", [endpoint(f"10.0.0.{number}", f"pod-{number}")]))
    async with running(access) as told:
        await told.until_states(**{f"pod-{number}": "ready" for number in range(5)})
        await api.until_watches()
    assert [one.verb for one in api.calls] == ["list", "list", "list", "watch"]


async def test_a_page_that_expired_has_the_list_begun_anew(api: KubernetesApi, access: Access) -> None:
    api.page = 1
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    await api.put(endpoint_slice("sglang-b", [endpoint("10.0.0.2", "pod-2")]))
    async with running(access) as told:
        await told.until(lambda: told.members)
        api.forget()
        api.reset()
        await told.until(lambda: len([one for one in api.calls if one.verb == "list"]) >= 4)
        await told.until_states(**{"pod-1": "ready", "pod-2": "ready"})


@pytest.mark.parametrize("as_status", [False, True])
async def test_a_forgotten_version_has_all_listed_anew(api: KubernetesApi, access: Access, as_status: bool) -> None:
    api.gone_as_status = as_status
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    async with running(access) as told:
        await api.until_watches()
        await api.stop()
        api.slices = {"sglang-b": endpoint_slice("sglang-b", [endpoint("10.0.0.2", "pod-2")])}
        api.forget()
        await api.start()
        await told.until_states(**{"pod-2": "ready"})


async def test_a_bookmark_moves_the_version_on_so_that_nothing_is_listed_again(
    api: KubernetesApi, access: Access
) -> None:
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    async with running(access) as told:
        await api.until_watches()
        await api.bookmark()
        bookmarked = str(api.version)
        told_before = len(told.members)
        async with asyncio.timeout(PATIENCE_S):
            while api.queries[-1].get("resourceVersion") != bookmarked:  # the loop may not have read it before a reset
                api.reset()
                await asyncio.sleep(0.05)
        await api.until_watches()
        await told.until(lambda: len(told.members) > told_before)
    assert [one.verb for one in api.calls].count("list") == 1


async def test_a_reset_connection_is_said_and_goes_on_where_it_was(api: KubernetesApi, access: Access) -> None:
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    async with running(access) as told:
        await api.until_watches()
        api.reset()
        await told.until(lambda: told.troubles)
        await api.until_watches()
        await api.put(endpoint_slice("sglang-b", [endpoint("10.0.0.2", "pod-2")]))
        await told.until_states(**{"pod-1": "ready", "pod-2": "ready"})
        assert api.url in told.troubles[0]
    assert [one.verb for one in api.calls].count("list") == 1


async def test_an_api_server_that_restarts_takes_nothing_away(api: KubernetesApi, access: Access) -> None:
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    async with running(access) as told:
        await api.until_watches()
        await api.stop()
        await told.until(lambda: any("refused" in text for text in told.troubles))
        assert all(told.members), "nothing but what there was is told while the server is away"
        await api.start()
        await api.put(endpoint_slice("sglang-b", [endpoint("10.0.0.2", "pod-2")]))
        await told.until_states(**{"pod-1": "ready", "pod-2": "ready"})


async def test_a_watch_that_ends_in_time_is_no_trouble(api: KubernetesApi, access: Access) -> None:
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    timing = Timing(watch_s=1, first_retry_s=0.02, settled_s=0.5, gather_s=0.0)
    async with running(access, timing=timing) as told:
        await told.until(lambda: len(told.members) >= 4)
    assert told.troubles == []
    assert [one.verb for one in api.calls][:3] == ["list", "watch", "watch"]


async def test_a_connection_that_falls_silent_is_noticed(api: KubernetesApi, access: Access) -> None:
    timing = Timing(list_s=0.3, first_retry_s=0.02, last_retry_s=0.05, settled_s=0.5, gather_s=0.0)
    api.silent = True
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    async with running(access, timing=timing) as told:
        await told.until(lambda: told.troubles)
        assert "timed out" in told.troubles[0].lower()
        api.silent = False
        await told.until_states(**{"pod-1": "ready"})


async def test_a_watch_that_outlasts_its_time_in_silence_is_given_up(api: KubernetesApi, access: Access) -> None:
    api.endless = True
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    async with running(access, timing=Timing(watch_s=1, silence_s=0.2, first_retry_s=0.02)) as told:
        await told.until(lambda: told.troubles)
        assert "timed out" in told.troubles[0].lower()
        await told.until(lambda: [one.verb for one in api.calls].count("watch") == 2)
    assert [one.verb for one in api.calls].count("list") == 1


async def test_cancelling_ends_a_call_that_gets_no_answer(api: KubernetesApi, access: Access) -> None:
    api.silent = True
    loop = asyncio.get_running_loop()
    async with running(access, timing=Timing(list_s=60.0)):
        async with asyncio.timeout(PATIENCE_S):
            while not api.calls:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        began = loop.time()
    assert loop.time() - began < 1.5, "the socket was shut down, not waited for"


async def test_what_is_no_event_is_said_and_all_is_listed_anew(api: KubernetesApi, access: Access) -> None:
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    async with running(access) as told:
        await api.until_watches()
        await api.send(b'{"type":"MODIFIED","object":{"metadata":{"name":"sglang-a"},"endpoints":[{"addresses":7}]}}')
        await told.until(lambda: told.troubles)
        assert "no EndpointSlice" in told.troubles[0]
        await told.until(lambda: [one.verb for one in api.calls].count("list") >= 2)
        await told.until_states(**{"pod-1": "ready"})


async def test_a_missing_right_is_named(api: KubernetesApi, access: Access) -> None:
    api.allow = {("list", "discovery.k8s.io", "endpointslices")}
    async with running(access) as told:
        await told.until(lambda: told.troubles)
        assert "the right to watch endpointslices (discovery.k8s.io) in namespace models" in told.troubles[0]
        api.allow = None
        await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
        await told.until_states(**{"pod-1": "ready"})


async def test_a_server_that_wants_to_be_left_alone_is_left_alone(api: KubernetesApi, access: Access) -> None:
    loop = asyncio.get_running_loop()
    api.fails.append(Answer(429, "TooManyRequests", "too many requests", Retry_After="1"))
    began = loop.time()
    async with running(access) as told:
        await told.until(lambda: told.members)
        assert loop.time() - began >= 1.0


async def test_a_slice_with_several_ports_is_said_and_the_others_are_used(api: KubernetesApi, access: Access) -> None:
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    ports = (("http", 30000), ("metrics", 9100))
    await api.put(endpoint_slice("sglang-b", [endpoint("10.0.0.2", "pod-2")], ports=ports))
    async with running(access) as told:
        await told.until(lambda: told.troubles)
        assert told.states == {"pod-1": "ready"}
        assert "http (30000), metrics (9100)" in told.troubles[0]


async def test_a_pod_speaks_as_its_service_account_and_takes_up_new_tokens(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    account = tmp_path / "serviceaccount"
    account.mkdir()
    (account / "ca.crt").symlink_to(certificates.ca)
    (account / "token").write_text("first")
    (account / "namespace").write_text("models")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificates.certificate, certificates.key)
    async with kubernetes_api(tls) as api:
        api.tokens = {"first"}
        await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
        environ = {"KUBERNETES_SERVICE_HOST": api.host, "KUBERNETES_SERVICE_PORT": str(api.port)}
        async with running(Access(service_account=account), environ=environ) as told:
            await told.until_states(**{"pod-1": "ready"})
            await api.until_watches()
            (account / "token").write_text("second")
            api.tokens = {"second"}
            await api.put(endpoint_slice("sglang-b", [endpoint("10.0.0.2", "pod-2")]))
            api.reset()
            await api.until_watches()
            await told.until_states(**{"pod-1": "ready", "pod-2": "ready"})
        assert {one.namespace for one in api.calls} == {"models"}
        assert {one.lower() for one in api.bearers} == {"bearer first", "bearer second"}


async def test_a_token_that_is_not_good_is_said_without_the_token(api: KubernetesApi, tmp_path: Path) -> None:
    api.tokens = {"good"}
    async with running(Access(kubeconfig=kubeconfig(api, tmp_path, token="stolen-secret"))) as told:
        await told.until(lambda: told.troubles)
    assert "does not accept the token" in told.troubles[0]
    assert "stolen-secret" not in "".join(told.troubles)


async def test_a_kubeconfig_that_appears_later_is_taken_up(api: KubernetesApi, tmp_path: Path) -> None:
    await api.put(endpoint_slice("sglang-a", [endpoint("10.0.0.1", "pod-1")]))
    path = tmp_path / "kubeconfig"
    async with running(Access(kubeconfig=str(path))) as told:
        await told.until(lambda: told.troubles)
        assert str(path) in told.troubles[0]
        kubeconfig(api, tmp_path)
        await told.until_states(**{"pod-1": "ready"})
