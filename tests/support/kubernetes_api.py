"""A small Kubernetes API server on a real socket: lists, watches, scale subresources, patches, and its bad days.

It speaks as the real one does where a client can tell the difference: chunked lines of JSON, continue tokens,
`resourceVersion`, bookmarks, 410, `Status` objects for errors, and 415 for a strategic merge patch of a custom
resource.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]
SLICE_KIND: Json = {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1"}
PATCHES = ("application/merge-patch+json", "application/json-patch+json", "application/apply-patch+yaml")


class Call(NamedTuple):
    """One request, as RBAC sees it."""

    verb: str
    group: str
    resource: str
    """With its subresource: deployments/scale."""
    namespace: str
    name: str


class Answer(Exception):
    """A reply that is a Status."""

    def __init__(self, code: int, reason: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.code, self.headers = code, headers
        self.body: Json = {
            **{"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"},
            **{"message": message, "reason": reason, "code": code},
        }


@dataclass
class KubernetesApi:
    """The server and what is in its cluster. Change the fields while it runs."""

    tokens: set[str] | None = None
    """That are good; None: no authentication."""
    allow: set[tuple[str, str, str]] | None = None
    """Rights as (verb, group, resource); None: all."""
    slices: dict[str, Json] = field(default_factory=dict)
    workloads: dict[tuple[str, str], Json] = field(default_factory=dict)
    """By plural and name."""
    pods: dict[str, Json] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    queries: list[dict[str, str]] = field(default_factory=list)
    bearers: list[str] = field(default_factory=list)
    media: set[str] = field(default_factory=set)
    """Content types of patches."""
    page: int = 500
    """The most that a list page has, whatever `limit` says."""
    conflicts: int = 0
    """So many patches to come are answered with 409."""
    fails: list[Answer] = field(default_factory=list)
    """Answers to the next requests, instead of the right ones."""
    silent: bool = False
    """Requests are read and never answered."""
    gone_as_status: bool = False
    """Whether a watch from a forgotten version is answered with HTTP 410 rather than an ERROR event; both occur."""
    endless: bool = False
    """Whether watches go on for ever, whatever `timeoutSeconds` says."""
    version: int = 1000
    host: str = "127.0.0.1"
    port: int = 0

    def __post_init__(self) -> None:
        self._history: list[tuple[int, str, Json]] = []
        self._oldest = 0
        self._snapshots: dict[str, tuple[list[Json], int]] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self.watches = 0
        """Under way."""
        self.tls: ssl.SSLContext | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    async def start(self) -> None:
        """Listen; again on the same port after `stop`."""
        self._server = await asyncio.start_server(self._serve, self.host, self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Go away as a process that is killed: every connection is reset."""
        if self._server is not None:
            self._server.close()
            self.reset()
            self._server = None

    def reset(self) -> None:
        """Reset every connection there is."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def put(self, found: Json) -> None:
        """Create or change an EndpointSlice."""
        name = found["metadata"]["name"]
        await self._note("MODIFIED" if name in self.slices else "ADDED", found)
        self.slices[name] = found

    async def remove(self, name: str) -> None:
        await self._note("DELETED", self.slices.pop(name))

    async def bookmark(self) -> None:
        """Something else changed, which watchers hear of by a bookmark alone."""
        empty: Json = {"metadata": {"creationTimestamp": None}, "addressType": "", "endpoints": None, "ports": None}
        await self._note("BOOKMARK", {**SLICE_KIND, **empty})

    async def send(self, line: bytes) -> None:
        """Have watchers sent this line, whatever it is."""
        await self._note("", {"line": line.decode()})

    def forget(self) -> None:
        """Compact etcd: only the present version is known."""
        self._oldest = self.version = self.version + 1
        self._history.clear()
        self._snapshots.clear()

    async def until_watches(self, count: int = 1) -> None:
        """Wait until so many watches are under way."""
        async with asyncio.timeout(20):
            while self.watches != count:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    def replay(self, recording: Path) -> list[bytes]:
        """Be as recorded at first; return the events, which `send` gives to watchers as they are."""
        first, *events = recording.read_bytes().splitlines()
        listed = json.loads(first)
        self.slices = {one["metadata"]["name"]: one for one in listed["items"]}
        self.version = self._oldest = int(listed["metadata"]["resourceVersion"])
        return events

    async def _note(self, kind: str, found: Json) -> None:
        self.version += 1
        if kind:
            found.setdefault("metadata", {})["resourceVersion"] = str(self.version)
        async with self._changed:
            self._history.append((self.version, kind, copy.deepcopy(found)))
            self._changed.notify_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        headers = {key.lower(): value.strip() for key, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        path, query = (
            urlsplit(target).path,
            {key: values[0] for key, values in parse_qs(urlsplit(target).query).items()},
        )
        call = _call(method, path, query)
        self.calls.append(call)
        self.queries.append(query)
        self.bearers.append(headers.get("authorization", ""))
        if self.silent:
            await reader.read()  # until the client gives up
            return False
        try:
            if self.fails:
                raise self.fails.pop(0)
            self._check(call, headers)
            if call.verb == "watch":
                await self._watch(writer, query)
                return False
            answer = self._answer(call, query, headers, body)
        except Answer as error:
            _reply(writer, error.code, error.body, error.headers)
        else:
            _reply(writer, 200, answer, {})
        await writer.drain()
        return True

    def _check(self, call: Call, headers: dict[str, str]) -> None:
        kind, _, token = headers.get("authorization", "").partition(" ")
        if self.tokens is not None and (kind.lower() != "bearer" or token not in self.tokens):
            raise Answer(401, "Unauthorized", "Unauthorized")
        if self.allow is not None and (call.verb, call.group, call.resource) not in self.allow:
            full = f"{call.resource}.{call.group}" if call.group else call.resource
            raise Answer(
                403,
                "Forbidden",
                f"{full}{f' {json.dumps(call.name)}' if call.name else ''} is forbidden: User "
                f'"system:serviceaccount:{call.namespace}:tidegate" cannot {call.verb} resource "{call.resource}" in '
                f'API group "{call.group}" in the namespace "{call.namespace}"',
            )

    def _answer(self, call: Call, query: dict[str, str], headers: dict[str, str], body: bytes) -> Json:
        if call.resource == "endpointslices":
            return self._list(query)
        plural, _, subresource = call.resource.partition("/")
        store = (
            self.pods
            if plural == "pods"
            else {name: one for (kind, name), one in self.workloads.items() if kind == plural}
        )
        found = store.get(call.name)
        if found is None:
            full = f"{plural}.{call.group}" if call.group else plural
            raise Answer(404, "NotFound", f'{full} "{call.name}" not found')
        if call.verb == "patch":
            media = headers.get("content-type", "")
            self.media.add(media)
            builtin = call.group in ("", "apps")
            if media not in PATCHES and not (builtin and media == "application/strategic-merge-patch+json"):
                raise Answer(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {media}")
            if self.conflicts:
                self.conflicts -= 1
                raise Answer(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {plural} "{call.name}": the object has been modified; please '
                    "apply your changes to the latest version and try again",
                )
            self.version += 1
            found.setdefault("metadata", {})["resourceVersion"] = str(self.version)
            _merge(found, json.loads(body))
        return _scale(found) if subresource else found

    def _list(self, query: dict[str, str]) -> Json:
        token = query.get("continue")
        if token is None:
            matching = [one for one in self.slices.values() if _matches(one, query.get("labelSelector", ""))]
            key, start = str(self.version), 0
            self._snapshots[key] = (copy.deepcopy(matching), self.version)
        else:
            key, _, offset = base64.b64decode(token).decode().partition("/")
            start = int(offset)
            if key not in self._snapshots:
                raise Answer(410, "Expired", "The provided continue parameter is too old to display a consistent list.")
        items, version = self._snapshots[key]
        end = start + min(int(query.get("limit", self.page)), self.page)
        metadata: Json = {"resourceVersion": str(version)}
        if end < len(items):
            metadata["continue"] = base64.b64encode(f"{key}/{end}".encode()).decode()
            metadata["remainingItemCount"] = len(items) - end
        return {**SLICE_KIND, "kind": "EndpointSliceList", "metadata": metadata, "items": items[start:end]}

    async def _watch(self, writer: asyncio.StreamWriter, query: dict[str, str]) -> None:
        since = int(query["resourceVersion"])
        too_old = Answer(410, "Expired", f"too old resource version: {since} ({self._oldest})")
        if since < self._oldest and self.gone_as_status:
            raise too_old
        _head(writer, 200, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
        self.watches += 1
        try:
            async with asyncio.timeout(None if self.endless else int(query["timeoutSeconds"])):
                if since < self._oldest:
                    _chunk(writer, json.dumps({"type": "ERROR", "object": too_old.body}))
                    return
                await self._events(writer, since, query.get("labelSelector", ""))
        except TimeoutError:
            pass
        finally:
            self.watches -= 1
            if not writer.is_closing():
                writer.write(b"0\r\n\r\n")

    async def _events(self, writer: asyncio.StreamWriter, since: int, selector: str) -> None:
        while not writer.is_closing():
            async with self._changed:
                for version, kind, found in self._history:
                    if version <= since:
                        continue
                    since = version
                    if not kind:
                        _chunk(writer, found["line"])
                    elif kind == "BOOKMARK" or _matches(found, selector):
                        _chunk(writer, json.dumps({"type": kind, "object": {**SLICE_KIND, **found}}))
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.2):  # then see whether the client has gone
                        await self._changed.wait()


@asynccontextmanager
async def kubernetes_api(tls: ssl.SSLContext | None = None) -> AsyncIterator[KubernetesApi]:
    """One that runs while the block does."""
    api = KubernetesApi()
    api.tls = tls
    await api.start()
    try:
        yield api
    finally:
        await api.stop()


def kubeconfig(api: KubernetesApi, folder: Path, *, token: str = "", namespace: str = "models", ca: str = "") -> str:
    """Write one for this server; return its path. JSON is YAML."""
    cluster: Json = {"server": api.url, **({"certificate-authority": ca} if ca else {})}
    path = folder / "kubeconfig"
    path.write_text(
        json.dumps(
            {
                **{"apiVersion": "v1", "kind": "Config", "current-context": "test"},
                "clusters": [{"name": "test", "cluster": cluster}],
                "users": [{"name": "me", "user": {"token": token} if token else {}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "me", "namespace": namespace}}],
            }
        )
    )
    return str(path)


def endpoint(address: str, pod: str = "", *, zone: str = "eu-west-1a", node: str = "gpu-1", **conditions: bool) -> Json:
    """An endpoint as the controller writes it; ready unless `conditions` say otherwise."""
    said = {"ready": True, "serving": True, "terminating": False, **conditions}
    found: Json = {"addresses": [address], "conditions": said, "nodeName": node, "zone": zone}
    if pod:
        found["targetRef"] = {"kind": "Pod", "namespace": "models", "name": pod, "uid": f"uid-of-{pod}"}
    return found


def endpoint_slice(
    name: str,
    endpoints: Sequence[Json] | None,
    *,
    service: str = "sglang",
    family: str = "IPv4",
    ports: Sequence[tuple[str, int]] = (("http", 30000),),
    **labels: str,
) -> Json:
    """A slice as the controller writes it, without the metadata that nobody reads; recordings have all of it."""
    return {
        "metadata": {
            **{"name": name, "generateName": f"{service}-", "namespace": "models"},
            "labels": {"kubernetes.io/service-name": service, **labels},
        },
        "addressType": family,
        "endpoints": list(endpoints) if endpoints is not None else None,
        "ports": [{"name": called, "port": number, "protocol": "TCP"} for called, number in ports] or None,
    }


def workload(kind: str, name: str, replicas: int) -> Json:
    return {"kind": kind, "metadata": {"name": name}, "spec": {"replicas": replicas}, "status": {"replicas": replicas}}


def _call(method: str, path: str, query: dict[str, str]) -> Call:
    parts = [unquote(part) for part in path.strip("/").split("/")]
    group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:])
    _, namespace, plural, *names = rest
    name, subresource = (*names, "", "")[:2]
    verb = {"PATCH": "patch", "PUT": "update", "POST": "create", "DELETE": "delete"}.get(method) or (
        "get" if name else "watch" if query.get("watch") in ("true", "True", "1") else "list"
    )
    return Call(verb, group, f"{plural}/{subresource}" if subresource else plural, namespace, name)


def _scale(found: Json) -> Json:
    replicas = found["spec"]["replicas"]
    return {
        **{"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": found["metadata"]},
        "spec": {"replicas": replicas} if replicas else {},  # Go's omitempty
        "status": {"replicas": found["status"]["replicas"], "selector": "app=sglang"},
    }


def _matches(found: Json, selector: str) -> bool:
    labels = found["metadata"].get("labels", {})
    return all(
        labels.get(key) == value for key, _, value in (term.partition("=") for term in selector.split(",") if term)
    )


def _merge(target: Json, patch: Json) -> None:
    """RFC 7396."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            _merge(target[key], value)
        else:
            target[key] = value


def _head(writer: asyncio.StreamWriter, status: int, headers: dict[str, str]) -> None:
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{key}: {value}" for key, value in headers.items())]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())


def _chunk(writer: asyncio.StreamWriter, text: str) -> None:
    data = (text + "\n").encode()
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _reply(writer: asyncio.StreamWriter, status: int, body: Json, headers: dict[str, str]) -> None:
    data = (json.dumps(body) + "\n").encode()
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    _head(writer, status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **named})
    writer.write(data)
