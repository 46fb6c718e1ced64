"""Ray addresses that users write: told apart, and found to answer or not within seconds."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from cluster.errors import ClusterUnreachable
from configs.errors import UserError
from configs.urls import require_no_credentials

DASHBOARD_URL = "http://127.0.0.1:8265"
CONNECT_SECONDS = 5.0
"""Ray's own attempts on a closed port last 80 s and then end the process with exit code 15."""
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What an HTTP/2 client says first: the magic and an empty SETTINGS frame (RFC 9113, section 3.4)."""
HTTP2_SETTINGS = 4
HOW_TO_AUTHENTICATE = (
    "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token; "
    "a cluster without authentication wants RAY_AUTH_MODE=disabled"
)


def dashboard_url(address: str | None) -> str:
    """The URL that takes jobs: ``address``, or ``RAY_API_SERVER_ADDRESS``, or ``RAY_ADDRESS``, or this machine's 8265.

    Raises :class:`UserError` for what is no such URL and :class:`ClusterUnreachable` where nothing listens.
    """
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DASHBOARD_URL
    url = given if "://" in given else f"http://{given}"
    require_no_credentials(url, "--address")
    host, port = _host_and_port(url, given)
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(
            f"address {given!r}: jobs are taken by the dashboard, for example http://head:8265; ray:// and the "
            "port 6379 of drivers do not take them"
        )
    require_listening(host, port or (443 if url.startswith("https") else 80))
    return url.rstrip("/")


def require_driver_address(address: str) -> None:
    """Check the address of a cluster that a driver is about to join: ``auto``, ``local`` or ``host:port``."""
    if address in ("auto", "local"):
        return
    if "://" in address:
        raise UserError(
            f"Ray address {address!r}: a driver joins by host:port, for example head:6379; "
            "to send the command to a cluster by its dashboard's URL use pma submit"
        )
    host, port = _host_and_port(f"ray://{address}", address)
    if port is None:
        raise UserError(f"Ray address {address!r}: expected host:port, for example {host}:6379")
    require_listening(host, port)
    if os.environ.get("RAY_USE_TLS", "0") != "1" and not _speaks_grpc(host, port):
        raise ClusterUnreachable(
            f"{host}:{port} answers, but not as Ray's control store: drivers join at port 6379 unless the cluster says "
            "otherwise; the dashboard's port (8265) is for pma submit"
        )


def require_listening(host: str, port: int) -> None:
    """Raise :class:`ClusterUnreachable` unless something listens at ``host:port``, within :data:`CONNECT_SECONDS`."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"no Ray answers at {host}:{port} ({error}); check the address, that the cluster is up, and that this "
            "machine reaches it (ssh -L or kubectl port-forward)"
        ) from error


def _speaks_grpc(host: str, port: int) -> bool:
    """Whether the listener greets as HTTP/2 servers do, with a SETTINGS frame; Ray itself would wait minutes for it."""
    with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
        try:
            connection.sendall(HTTP2_PREFACE)
            frame = connection.recv(9, socket.MSG_WAITALL)
        except OSError:
            return False
    return len(frame) == 9 and frame[3] == HTTP2_SETTINGS


def _host_and_port(url: str, given: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"Ray address {given!r}: {error}; expected host:port or http://host:port") from error
    if not host:
        raise UserError(f"Ray address {given!r}: expected host:port or http://host:port")
    return host, port
