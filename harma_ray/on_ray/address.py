"""Whether a Ray cluster answers at an address, asked before Ray itself, which keeps trying for 14 minutes, is."""

import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

from harma_ray.errors import UserError
from harma_ray.on_ray.quirks import find_running_cluster

PATIENCE_SECONDS = 5.0
"""How long a head that does not answer yet is waited for: it may be starting."""

_ANSWER_SECONDS = 15.0
"""How long a head that took the call may need for its answer: it may be busy."""

_JOB = "`ray job submit --address http://HEAD:8265 --working-dir . -- python launch.py ...`"
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"


def find_address(address: str | None) -> str | None:
    """Returns the address of a cluster that answers, as Ray takes it; None: none is wanted, one is to be started.

    Args:
        address: What the user gave; None: what ``RAY_ADDRESS`` says.

    Raises:
        UserError: If the address has not the form of one that can be joined, or no cluster answers there.
    """
    asked, origin = _asked(address)
    if asked in ("", "local"):
        return None
    if asked == "auto":
        probe(_running_here(), origin, token=_token())
    else:
        probe(asked, origin, token=_token() if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" else None)
    return asked


def starts_own(address: str | None) -> bool:
    """Tells whether a command with this address, or none, starts a cluster of this machine's own."""
    return _asked(address)[0] in ("", "local")


def _asked(address: str | None) -> tuple[str, str]:
    """Returns the address that is wanted, as Ray finds it, and who says so."""
    named = os.environ.get("RAY_ADDRESS", "").strip()
    asked = (address or "").strip()
    origin = "--address" if asked else "RAY_ADDRESS"
    if asked in ("", "auto") and named not in ("", "auto"):  # as Ray has it
        asked, origin = named, "RAY_ADDRESS"
    return asked or named, origin


def probe(address: str, origin: str, token: str | None) -> None:
    """Checks that a cluster's head answers at an address.

    Args:
        address: HOST:PORT.
        origin: Where the user gave it, for the message.
        token: That Ray will show there.

    Raises:
        UserError: If not.
    """
    host, port = _parts(address, origin)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        reason = _silence(host, port)
        if reason is None:
            break
        if time.monotonic() > deadline:
            raise UserError(f"no Ray cluster answers at {address} ({reason}); {_way_out(origin)}")
        time.sleep(0.2)
    reason = _stranger(address, token)
    if reason:
        raise UserError(
            f"what answers at {address} is no head of a Ray cluster ({reason}); give HOST:PORT as `ray start --head` "
            f"prints it, port 6379 unless told otherwise, or {_way_out(origin)}"
        )


def _parts(address: str, origin: str) -> tuple[str, int]:
    """Returns host and port."""
    scheme, separator, rest = address.partition("://")
    if separator and scheme == "ray":
        raise UserError(
            f"`{address}` is an address of Ray Client, which cannot drive Ray Data and Ray Train; on a machine of the "
            f"cluster give HOST:6379, from elsewhere submit a job: {_JOB}"
        )
    if separator and scheme in ("http", "https"):
        raise UserError(
            f"`{address}` is the address of a dashboard, which takes jobs: "
            f"{_JOB.replace('http://HEAD:8265', address)}; to join the cluster from one of its machines give HOST:6379"
        )
    try:
        found = urlsplit(f"//{rest if separator else address}")
        host, port = found.hostname, found.port
    except ValueError:
        host = port = None
    if separator or not host or not port or found.netloc != address or "@" in address or host.count(":") == 1:
        raise UserError(
            f"a Ray cluster's address must be HOST:PORT, [IPV6]:PORT, `auto` or `local`, got `{address}` from "
            f"{origin}; `ray start --head` prints it, port 6379 unless told otherwise"
        )
    return host, port


def _silence(host: str, port: int) -> str | None:
    """Returns why nothing can be reached at a place; None: something can."""
    try:
        socket.create_connection((host, port), timeout=PATIENCE_SECONDS).close()
    except socket.gaierror:
        return f"the name `{host}` is unknown here"
    except TimeoutError:
        return f"no answer in {PATIENCE_SECONDS:g} s"
    except (OSError, UnicodeError) as error:
        return (getattr(error, "strerror", None) or str(error)).lower()
    return None


def needs_token(address: str) -> UserError:
    """Returns the error of a cluster that does not let this program in."""
    return UserError(
        f"the Ray cluster at {address} wants a token that this program does not have or has wrong; set "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, as on the cluster's head"
    )


def _token() -> str | None:
    """Returns the token that Ray finds, in Ray's order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return file.read_text().strip() or None
    except OSError:
        return None


def _stranger(address: str, token: str | None) -> str | None:
    """Returns why what answers is not the head of a Ray cluster; None: it is, or speaks in TLS and Ray must ask."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return None
    import grpc

    channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        metadata = (("authorization", f"Bearer {token}"),) if token else None
        channel.unary_unary(_CHECK_ALIVE)(b"", timeout=_ANSWER_SECONDS, metadata=metadata)
    except grpc.RpcError as error:
        code = error.code()  # pyright: ignore[reportAttributeAccessIssue]
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            raise needs_token(address) from error
        if code == grpc.StatusCode.UNIMPLEMENTED:
            return "another service of gRPC, such as Ray Client's, port 10001"
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"it takes calls, and said nothing in {_ANSWER_SECONDS:g} s"
        return "it does not speak gRPC"
    finally:
        channel.close()
    return None


def _running_here() -> str:
    """Returns the address of the cluster that Ray finds by itself on this machine."""
    try:
        return find_running_cluster()
    except ConnectionError as error:
        raise UserError(
            "`auto` joins a Ray cluster that runs on this machine, and there is none; start one "
            "(cluster/start-head.sh), give HOST:PORT of one that this machine belongs to, or leave --address and "
            "RAY_ADDRESS out"
        ) from error


def _way_out(origin: str) -> str:
    if origin == "RAY_ADDRESS":
        return "unset RAY_ADDRESS for a cluster of this machine's own, or start the cluster it means"
    return "leave --address out for a cluster of this machine's own, or start the one it means"
