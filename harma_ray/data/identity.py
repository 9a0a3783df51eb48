"""Which data something was made from, by content: the place where a data set lies may change, what is in it may not."""

from collections.abc import Iterable, Mapping
from typing import Any

from harma_ray.config import RunConfig
from harma_ray.data.splits import Split, list_splits, open_split
from harma_ray.errors import UserError

Identity = Mapping[str, Mapping[str, Any]]
"""``fingerprint`` and ``rows`` of splits, by name."""


def content_fingerprint(split: Split) -> str:
    """Returns the fingerprint of a split; of vectors that of the split they were computed from."""
    known = split.manifest.inputs.get("manifest")
    return known if split.kind.is_encoded and known else split.fingerprint


def data_identity(data: str, splits: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns which splits a data set has, of those that are named."""
    there = set(list_splits(data))
    opened = [open_split(data, name) for name in dict.fromkeys(splits) if name in there]
    return {split.name: {"fingerprint": content_fingerprint(split), "rows": split.manifest.rows} for split in opened}


def used_splits(config: RunConfig) -> tuple[str, ...]:
    """Returns the names of the splits that a run trains on, picks its best epoch on and is evaluated on in the end."""
    return tuple(dict.fromkeys((config.data.train_split, config.selecting_split, config.data.test_split)))


def require_same_data(known: Identity, data: str, *, subject: str, way_out: str) -> None:
    """Checks that a data set still holds what it did.

    Args:
        known: What `data_identity` returned then.
        data: Folder of the data set now.
        subject: What was made from it, such as ``run runs/one``.
        way_out: What else the user can do than to put the data back.

    Raises:
        UserError: If a split has other content or is not there; all such splits are shown.
    """
    now = data_identity(data, known)
    changed = [name for name, split in known.items() if now.get(name, {}).get("fingerprint") != split["fingerprint"]]
    if changed:
        shown = "; ".join(f"`{name}` held {_show(known[name])} and holds {_show(now.get(name))}" for name in changed)
        raise UserError(
            f"{subject} was begun on other data than lies in {data} now: {shown}; put the data back as it was, or "
            f"{way_out}"
        )


def _show(split: Mapping[str, Any] | None) -> str:
    return f"{split['rows']:,} rows (fingerprint {split['fingerprint'][:12]})" if split else "nothing"
