"""Where a Ray cluster that is started here keeps its own files: logs, sockets, objects that left the memory."""

import logging
import os
import socket
import sys
import tempfile
from pathlib import Path

from harma_ray.errors import UserError

logger = logging.getLogger(__name__)

_SHORT = Path("/tmp")
_SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""What a Unix socket's path may have."""
_SESSION = f"session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/dash_MetricsHead"
"""The longest name that Ray 2.60 gives a socket, below its folder."""


def choose_folder() -> tuple[Path, Path | None]:
    """Returns Ray's folder, and where objects go that do not fit in memory if that is elsewhere.

    Ray itself takes ``RAY_TMPDIR``, else ``TMPDIR``, else ``/tmp``, and dies of one that does not serve. Here
    ``TMPDIR``, which is often set by others (Slurm), is made absolute and, if it does not serve Ray, replaced by
    ``/tmp`` with a warning; objects, which can be big, still go there if it is merely too long for sockets.
    ``RAY_TMPDIR`` is a choice and is refused.

    Raises:
        UserError: If no folder serves.
    """
    name = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    given = os.environ.get(name)
    wanted = (Path(given).absolute() if given else _SHORT) / "ray"
    reason = _fault(wanted)
    if reason is None:
        return wanted, None
    limit = _SOCKET_BYTES - len(f"/ray/{_SESSION}")
    way_out = f"export RAY_TMPDIR=FOLDER with a folder of this machine, of at most {limit} bytes, that you may write"
    if name == "RAY_TMPDIR" or wanted.parent == _SHORT:
        told = f"{name}={given}" if given else str(_SHORT)
        raise UserError(f"Ray's own files cannot lie in {told} ({reason}); {way_out}")
    short = _SHORT / "ray"
    other = _fault(short)
    if other:
        raise UserError(
            f"Ray's own files can lie neither in TMPDIR={given} ({reason}) nor in {_SHORT} ({other}); {way_out}"
        )
    spill = wanted if str(wanted).isascii() and _can_write(wanted) is None else None
    logger.warning(
        "Ray's own files go to %s, not to TMPDIR=%s (%s)%s; to choose, export RAY_TMPDIR",
        short, given, reason, "; objects that do not fit in memory still go there" if spill else "",
    )  # fmt: skip
    return short, spill


def _fault(folder: Path) -> str | None:
    """Returns why a folder cannot be Ray's; None: it can."""
    if not str(folder).isascii():
        return "Ray takes a path of ASCII letters alone"
    num_bytes = len(os.fsencode(folder / _SESSION))
    if num_bytes > _SOCKET_BYTES:
        return f"its path makes those of sockets {num_bytes} bytes long, {_SOCKET_BYTES} are allowed"
    return _can_write(folder, socket_too=True)


def _can_write(folder: Path, *, socket_too: bool = False) -> str | None:
    """Returns why a folder cannot be made or written into, or holds no sockets."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="try-", dir=folder) as place:
            if socket_too:
                with socket.socket(socket.AF_UNIX) as tried:
                    tried.bind(str(Path(place) / "socket"))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None
