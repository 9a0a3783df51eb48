"""Which data something was made from, by content: the place where a data set lies may change, what is in it may not."""

from collections.abc import Mapping
from typing import Any

from harma_ray.config import RunConfig
from harma_ray.data.splits import Split, list_splits, open_split
from harma_ray.errors import UserError, count

Identity = Mapping[str, Mapping[str, Any]]
"""``fingerprint`` and ``rows`` of splits, by name."""


def content_fingerprint(split: Split) -> str:
    """Returns the fingerprint of a split; of vectors that of the split they were computed from."""
    known = split.manifest.inputs.get("manifest")
    return known if split.kind.is_encoded and known else split.fingerprint


def split_identity(split: Split) -> dict[str, Any]:
    """Returns ``fingerprint`` and ``rows`` of a split."""
    return {"fingerprint": content_fingerprint(split), "rows": split.manifest.rows}


def data_identity(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Returns what the splits hold that a run's figures depend on; those that are not there are left out."""
    used = used_splits(config).items()
    there = {folder: set(list_splits(folder)) for _, (folder, _) in used}
    return {name: split_identity(open_split(folder, split)) for name, (folder, split) in used if split in there[folder]}


def used_splits(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Returns data set and name of the splits that a run's figures depend on, by what they are called in records.

    Those that it trains on, picks its best epoch on and is evaluated on in the end are called by their names, those of
    other data sets by the setting too, such as ``features.data/val``.
    """
    return {
        split if setting == "data.path" else f"{setting}/{split}": (folder, split)
        for setting, (folder, splits) in config.data_sets.items()
        for split in splits
    }


def require_same_data(known: Identity, config: RunConfig, *, subject: str, way_out: str) -> None:
    """Checks that the data sets of a run still hold what they did.

    Args:
        known: What `data_identity` returned then; what is not in it is not checked.
        config: The run's settings, by which the data sets lie where they do now.
        subject: What was made from it, such as ``run runs/one``.
        way_out: What else the user can do than to put the data back.

    Raises:
        UserError: If a split has other content or is not there; all such splits are shown.
    """
    now, used = data_identity(config), used_splits(config)
    changed = [name for name, split in known.items() if now.get(name, {}).get("fingerprint") != split["fingerprint"]]
    if changed:
        places = " and ".join(dict.fromkeys(used.get(name, (config.data.path,))[0] for name in changed))
        shown = "; ".join(f"`{name}` held {_show(known[name])} and holds {_show(now.get(name))}" for name in changed)
        raise UserError(
            f"{subject} was begun on other data than lies in {places} now: {shown}; put the data back as it was, or "
            f"{way_out}"
        )


def unknown_data(known: Identity, now: Identity, *, subject: str = "the checkpoint") -> list[str]:
    """Returns a line for the user if what some splits held when something was begun, or written, was not kept.

    Args:
        known: What was kept of them.
        now: What they hold.
        subject: What should say it.
    """
    unknown = [name for name in now if name not in known]
    text = f"{subject} does not say what {', '.join(unknown)} held, so nobody can tell if that changed"
    return [text] if unknown else []


def _show(split: Mapping[str, Any] | None) -> str:
    return f"{count(split['rows'], 'row')} (fingerprint {split['fingerprint'][:12]})" if split else "nothing"
