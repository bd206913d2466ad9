"""The only place that touches the official Python client (https://github.com/kubernetes-client/python).

It brings what is tedious to do well: service accounts and their rotated tokens, kubeconfigs with certificates and exec
plugins, TLS. Its models and its `Watch` are not used: answers are handed on as bytes, since reading a list of 1,000
endpoints into models costs thirty times what `slices` needs. It blocks, so all of this runs in threads
(`threads.blocking`), and `Cluster.close` may be called from any other thread to end what is under way.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from backends.kubernetes.errors import (
    BY_STATUS,
    ApiAnswered,
    ApiAway,
    ClientMissing,
    Expired,
    KubernetesError,
    NoAccess,
)
from backends.kubernetes.slices import Status

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where every pod finds its token, the authority's certificate and its namespace."""
IN_CLUSTER = ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT")
MERGE_PATCH = "application/merge-patch+json"
"""RFC 7396, for every kind alike: custom resources know no strategic merge."""
FIELD_MANAGER = "tidegate"

_KEEP_ALIVE = (("SO_KEEPALIVE", 1), ("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
"""A peer that vanished without a word is noticed after 30 s, also where the watch itself would be silent for longer."""
_LONGEST_MESSAGE = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How to get at an API server: as a pod's service account, else by a kubeconfig."""

    kubeconfig: str | None = None
    """Path. None: the service account, else what KUBECONFIG names, else ~/.kube/config."""
    context: str | None = None
    """Of the kubeconfig; one that is given rules the service account out. None: its current one."""
    namespace: str | None = None
    """None: the service account's or the context's, else `default`."""
    service_account: Path = SERVICE_ACCOUNT
    connect_timeout_s: float = 5.0
    """Seconds for a connection, name look-up excluded."""


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object, as its addresses and rights spell it."""

    group: str
    version: str
    plural: str
    subresource: str = ""

    def __str__(self) -> str:
        full = f"{self.plural}/{self.subresource}" if self.subresource else self.plural
        return f"{full} ({self.group})" if self.group else full


SLICES = Resource("discovery.k8s.io", "v1", "endpointslices")
PODS = Resource("", "v1", "pods")


def connect(access: Access, environ: Mapping[str, str] | None = None) -> Cluster:
    """Read who and where we are; nothing is sent yet. Raises `ClientMissing` and `NoAccess`."""
    client = _client()
    configuration = client.Configuration()
    namespace = _configure(configuration, access, os.environ if environ is None else environ)
    configuration.retries = False  # ours, with back-off; urllib3's would come at once and hide the reason
    configuration.connection_pool_maxsize = 2
    configuration.socket_options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *_keep_alive()]
    return Cluster(client, configuration, access.namespace or namespace or "default", access.connect_timeout_s)


class Cluster:
    """One API server, spoken to as somebody. Every method blocks, but `close`; each raises `KubernetesError`."""

    def __init__(self, client: ModuleType, configuration: Any, namespace: str, connect_timeout_s: float) -> None:
        self.namespace = namespace
        self.address: str = configuration.host
        self._client = client
        self._connect_timeout_s = connect_timeout_s
        self._sockets = _Sockets()
        self._api = client.ApiClient(configuration)
        self._sockets.track(self._api.rest_client.pool_manager)

    def close(self) -> None:
        """End what is under way, which then raises `ApiAway`, and close every connection. From any thread, at once."""
        self._sockets.close()
        self._api.close()

    def list_slices(self, selector: str, limit: int, token: str | None, timeout_s: float) -> bytes:
        """One page of EndpointSlices. `token`: the last page's `continue`."""
        api = self._client.DiscoveryV1Api(self._api)
        more = {"_continue": token} if token else {}
        with self._translated("list", SLICES):
            return _whole(
                api.list_namespaced_endpoint_slice(
                    self.namespace, label_selector=selector, limit=limit, **more, **self._raw(timeout_s)
                )
            )

    def watch_slices(
        self, selector: str, version: str, watch_s: int, silence_s: float, opened: Callable[[], object]
    ) -> Generator[bytes, None, None]:
        """Changes since `version`, one JSON object each, until the server ends it after `watch_s` seconds.

        `opened` is called when it has begun. Silence for `silence_s` seconds longer than it should last is `ApiAway`.
        """
        api = self._client.DiscoveryV1Api(self._api)
        with self._translated("watch", SLICES):
            reply = api.list_namespaced_endpoint_slice(
                self.namespace,
                label_selector=selector,
                resource_version=version,
                watch=True,
                allow_watch_bookmarks=True,
                timeout_seconds=watch_s,
                **self._raw(watch_s + silence_s),
            )
            opened()
            with contextlib.closing(reply):
                yield from _lines(reply)

    def scale(self, resource: Resource, name: str, timeout_s: float) -> bytes:
        """The Scale of a workload."""
        scale = Resource(resource.group, resource.version, resource.plural, "scale")
        api = self._client.CustomObjectsApi(self._api)  # whose addresses are those of built-in kinds too
        with self._translated("get", scale, name):
            return _whole(
                api.get_namespaced_custom_object_scale(*self._address(resource, name), **self._raw(timeout_s))
            )

    def patch_scale(self, resource: Resource, name: str, body: Mapping[str, Any], timeout_s: float) -> bytes:
        """Merge `body` into the Scale of a workload."""
        scale = Resource(resource.group, resource.version, resource.plural, "scale")
        api = self._client.CustomObjectsApi(self._api)
        with self._translated("patch", scale, name):
            return _whole(
                api.patch_namespaced_custom_object_scale(
                    *self._address(resource, name), dict(body), **self._patching(timeout_s)
                )
            )

    def patch_workload(self, resource: Resource, name: str, body: Mapping[str, Any], timeout_s: float) -> None:
        """Merge `body` into a workload itself."""
        api = self._client.CustomObjectsApi(self._api)
        with self._translated("patch", resource, name):
            _whole(
                api.patch_namespaced_custom_object(
                    *self._address(resource, name), dict(body), **self._patching(timeout_s)
                )
            )

    def patch_pod(self, name: str, body: Mapping[str, Any], timeout_s: float) -> None:
        """Merge `body` into a pod."""
        # Not by CoreV1Api: its 400 methods cost half a second of CPU and 21 MB to import, for this one.
        request = self._api.param_serialize(
            "PATCH",
            "/api/v1/namespaces/{namespace}/pods/{name}",
            {"namespace": self.namespace, "name": name},
            query_params=[("fieldManager", FIELD_MANAGER)],
            header_params={"Accept": "application/json", "Content-Type": MERGE_PATCH},
            body=dict(body),
            auth_settings=["BearerToken"],
        )
        with self._translated("patch", PODS, name):
            reply = self._api.call_api(*request, _request_timeout=(self._connect_timeout_s, timeout_s))
            data = _whole(reply.response)
            if not 200 <= reply.status <= 299:
                raise self._client.ApiException(http_resp=reply, body=data)

    def _address(self, resource: Resource, name: str) -> tuple[str, str, str, str, str]:
        return resource.group, resource.version, self.namespace, resource.plural, name

    def _raw(self, timeout_s: float) -> dict[str, Any]:
        return {"_preload_content": False, "_request_timeout": (self._connect_timeout_s, timeout_s)}

    def _patching(self, timeout_s: float) -> dict[str, Any]:
        return {"field_manager": FIELD_MANAGER, "_content_type": MERGE_PATCH, **self._raw(timeout_s)}

    @contextlib.contextmanager
    def _translated(self, verb: str, resource: Resource, name: str = "") -> Iterator[None]:
        """Make our errors of the client's, urllib3's and the system's."""
        import urllib3
        from kubernetes.config import ConfigException

        try:
            yield
        except self._client.ApiException as error:
            if not error.status:
                raise ApiAway(f"{self.address}: {_line(str(error.reason))}") from error
            raise self._answered(error, verb, resource, name) from error
        except urllib3.exceptions.HTTPError as error:
            raise ApiAway(f"{self.address}: {_reason(error)}") from error
        except (OSError, ValueError, ConfigException) as error:  # a token file that is gone or broken
            raise ApiAway(f"{self.address}: {_line(str(error))}") from error

    def _answered(self, error: Any, verb: str, resource: Resource, name: str) -> ApiAnswered:
        status = int(error.status)
        said = f"HTTP {status}"
        with contextlib.suppress(msgspec.MsgspecError):
            said = msgspec.json.decode(error.body or b"", type=Status).message or said
        where = f"namespace {self.namespace} at {self.address}"
        match status:
            case 403:
                text = f"the right to {verb} {resource} in {where} is missing"
            case 404 if name:
                text = f"there is no {resource} {name} in {where}"
            case 401:
                text = f"{self.address} does not accept the token or certificate"
            case _:
                text = f"cannot {verb} {resource}{' ' + name if name else ''} in {where}"
        headers = error.headers or {}
        wait = str(headers.get("Retry-After") or "")
        return BY_STATUS.get(status, ApiAnswered)(
            f"{text}: {_line(said)}", status=status, retry_after_s=float(wait) if wait.isdecimal() else 0.0
        )


def error_event(cluster: Cluster, raw: bytes) -> KubernetesError:
    """What an ERROR event of a watch means."""
    said = msgspec.json.decode(raw, type=Status)
    kind = Expired if said.code == 410 or said.reason == "Expired" else BY_STATUS.get(said.code, ApiAnswered)
    return kind(f"{cluster.address} ended the watch: {_line(said.message or said.reason)}", status=said.code or 500)


class _Sockets:
    """The connections of one client, so that those in use can be ended from outside.

    A thread that waits in `recv` wakes up when its socket is shut down, and by nothing else that is as quick.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed = False

    def track(self, pool_manager: Any) -> None:
        """Have every connection that this pool manager makes from now on known here."""
        pool_manager.pool_classes_by_scheme = {
            scheme: _tracked(kind, self) for scheme, kind in pool_manager.pool_classes_by_scheme.items()
        }

    def add(self, connection: Any) -> None:
        """Raises `ConnectionAbortedError` after `close`."""
        with self._lock:
            self._open.add(connection)
            if self._closed:
                raise ConnectionAbortedError("closed by this process")

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for connection in list(self._open):
                sock = connection.sock
                if sock is not None:
                    with contextlib.suppress(OSError):
                        # Not SSLSocket's own method, which drops the TLS object that the other thread is reading from.
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _tracked(pool: Any, sockets: _Sockets) -> Any:
    class Connection(pool.ConnectionCls):  # type: ignore[misc]  # the base is one of urllib3's, chosen by scheme
        def connect(self) -> None:
            sockets.add(self)
            super().connect()
            try:
                sockets.add(self)  # once more: it may have been closed meanwhile
            except ConnectionAbortedError:
                self.close()
                raise

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


def _client() -> ModuleType:
    try:
        from kubernetes import client
    except ModuleNotFoundError as error:
        if error.name != "kubernetes":
            raise  # it is there, and broken
        raise ClientMissing from error
    module: ModuleType = client
    return module


def _configure(configuration: Any, access: Access, environ: Mapping[str, str]) -> str:
    """Fill in address and credentials; return the namespace that comes with them, if any."""
    from kubernetes.config import ConfigException, list_kube_config_contexts, load_kube_config
    from kubernetes.config.incluster_config import InClusterConfigLoader

    tried = []
    if access.kubeconfig is None and access.context is None:
        missing = [name for name in IN_CLUSTER if not environ.get(name)]
        if not missing:
            try:
                InClusterConfigLoader(
                    str(access.service_account / "token"), str(access.service_account / "ca.crt"), environ=environ
                ).load_and_set(configuration)
            except (ConfigException, OSError) as error:
                raise NoAccess(f"the service account in {access.service_account} is of no use: {error}") from error
            with contextlib.suppress(OSError):
                return (access.service_account / "namespace").read_text().strip()
            return ""
        tried.append(f"this is no pod ({' and '.join(missing)} not set)")
    paths = access.kubeconfig or environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
    try:
        load_kube_config(paths, context=access.context, client_configuration=configuration, persist_config=False)
        contexts, current = list_kube_config_contexts(paths)
    except Exception as error:  # of a file's contents, whatever they are: YAML, types, missing keys, exec plugins
        tried.append(f"the kubeconfig {paths} is of no use: {_line(str(error))}")
        raise NoAccess("no way to a Kubernetes API: " + "; ".join(tried)) from error
    chosen = next((one for one in contexts if one["name"] == access.context), current)
    return str(chosen["context"].get("namespace") or "")


def _keep_alive() -> list[tuple[int, int, int]]:
    return [
        (socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in _KEEP_ALIVE
        if hasattr(socket, name)  # macOS has no TCP_KEEPIDLE
    ]


def _whole(reply: Any) -> bytes:
    with contextlib.closing(reply):
        data: bytes = reply.read()
        reply.release_conn()
        return data


def _lines(reply: Any) -> Iterator[bytes]:
    buffer = bytearray()
    for chunk in reply.stream(amt=None, decode_content=False):
        buffer += chunk
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            if line.strip():
                yield line
    if buffer.strip():
        raise ConnectionError("the watch broke off in the middle of an event")


def _reason(error: Exception) -> str:
    """urllib3's errors put the object's address first, and the system's reason inside brackets."""
    text = str(error)
    return _line(text.partition(">: ")[2] or text)


def _line(text: str) -> str:
    """On one line, and not longer than a log line should be."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST_MESSAGE else flat[:_LONGEST_MESSAGE] + "..."
