"""URLs of the databases in which searches may be kept."""

from typing import Any

import sqlalchemy
import sqlalchemy.exc

from harma_ray.files import output_path


def absolute_url(url: str) -> str:
    """Returns a storage's URL that does not depend on the working folder: that of a SQLite file by its whole path."""
    parsed = parse_url(url)
    if parsed is None or parsed.get_backend_name() != "sqlite" or not parsed.database or "uri" in parsed.query:
        return url
    return parsed.set(database=str(output_path(parsed.database))).render_as_string(hide_password=False)


def require_lasting(url: Any) -> str | None:
    """Returns what is the URL of a database that lasts, or None.

    Raises:
        ValueError: If it is anything else.
    """
    if url is not None and not (isinstance(url, str) and is_lasting(url)):
        rule = f"`storage` must be the URL of a database that lasts, got {url!r}"
        raise ValueError(f"{rule}; for example sqlite:///trials.db")
    return url


def is_lasting(url: str) -> bool:
    """Says whether a text is the URL of a database, and of none in memory."""
    parsed = parse_url(url)
    if parsed is None or parsed.get_backend_name() != "sqlite":
        return parsed is not None
    database = parsed.database or ":memory:"
    return ":memory:" not in database and parsed.query.get("mode") != "memory"


def show_url(url: str) -> str:
    """Returns a storage's URL without its password."""
    parsed = parse_url(url)
    return parsed.render_as_string(hide_password=True) if parsed else url


def parse_url(url: str) -> sqlalchemy.engine.URL | None:
    """Returns the parts of a URL; None if it is none."""
    try:
        return sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # the second for a port that is no number
        return None
