"""What can go wrong between the gateway and a Kubernetes API server.

    KubernetesError
    ├── ClientMissing     the official client is not installed
    ├── NoAccess          nothing says where the API server is, or as whom to speak to it
    ├── ApiAway           no connection, broken off, or no answer in time
    └── ApiAnswered       it answered, with something else than what was asked for
        ├── Unauthorized  401: the token or certificate is not (or no longer) good
        ├── Forbidden     403: a right is missing; the message names it
        ├── NotThere      404: the object, or its kind, does not exist
        ├── Conflict      409: somebody else changed it at the same time
        └── Expired       410: the version to go on from is gone; list anew

Foreign exceptions (the client's, urllib3's, `OSError`) are translated in `client.py` and stay reachable as `__cause__`.
"""

from __future__ import annotations


class KubernetesError(Exception):
    """Something about Kubernetes went wrong. The message says what, where, and what would help."""


class ClientMissing(KubernetesError):
    """The official Python client is not installed."""

    def __init__(self) -> None:
        super().__init__(
            "the Kubernetes client is not installed; it comes with the extra `kubernetes`: "
            "pip install 'tidegate[kubernetes]'"
        )


class NoAccess(KubernetesError):
    """Neither a service account nor a kubeconfig that can be used. Names what was tried."""


class ApiAway(KubernetesError):
    """The API server does not answer. What was read before may still hold."""


class ApiAnswered(KubernetesError):
    """The API server answered with an error."""

    def __init__(self, message: str, *, status: int, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status, 400 to 599; of an ERROR event its `code`."""
        self.retry_after_s = retry_after_s
        """Seconds that the server asks for; 0: it does not say."""


class Unauthorized(ApiAnswered):
    """The token or certificate was not accepted."""


class Forbidden(ApiAnswered):
    """A right is missing (RBAC)."""


class NotThere(ApiAnswered):
    """The object, or its kind, does not exist."""


class Conflict(ApiAnswered):
    """Somebody else changed the object at the same time."""


class Expired(ApiAnswered):
    """The API server no longer knows the version, or the page, to go on from."""


BY_STATUS: dict[int, type[ApiAnswered]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotThere,
    409: Conflict,
    410: Expired,
}
