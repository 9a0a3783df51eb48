"""Answers to queries whose targets are not public, as the evaluation server of CIRR wants them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from harma_ray.data.queries import ComposedQueries
from harma_ray.data.schema import Split, open_split
from harma_ray.data.stream import EvaluationStream, local_batches
from harma_ray.engine import default_place, evaluating
from harma_ray.errors import UserError
from harma_ray.files import output_path, write_text
from harma_ray.models.clip import unit
from harma_ray.models.composed import ComposedRetriever
from harma_ray.ranking import Groups, top_k
from harma_ray.recipes.clip4cir import Clip4CirTask
from harma_ray.runs import Run

NUM_RESULTS, NUM_SUBSET_RESULTS = 50, 3
"""Names that a query has in the two files."""


def predict_cirr(
    run: Run, data: str | Path, split: str, out: str | Path, name: str, *, metric: str | None = None
) -> tuple[Path, Path]:
    """Writes the two files of a submission to CIRR's server.

    Args:
        run: Of CLIP4Cir, either stage; its best weights answer.
        data: Folder of the converted data set.
        split: The split with the queries.
        out: Folder of the files; made if missing.
        name: Last part of their names.
        metric: What the best weights are the best by; None = the recipe's objective.

    Returns:
        The files ``recall_submission_NAME.json`` and ``recall_subset_submission_NAME.json``.

    Raises:
        UserError: If the run or the split is of another kind, the split lacks images or queries of the data set, the
            gallery is too small for a submission, or the files cannot be written.
    """
    task = run.task
    if not isinstance(task, Clip4CirTask):
        raise UserError(f"run {run.path} is of recipe {run.config.recipe}, which has no composed queries")
    if name != Path(name).name:
        raise UserError(f"`--name` must be a plain part of a file's name, got `{name}`")
    opened = open_split(data, split)
    queries = ComposedQueries.of(opened)
    subsets = _members(opened, queries)
    folder, model, place = output_path(out), run.load_model(metric), default_place(run.config)
    assert isinstance(model, ComposedRetriever)
    device = torch.device(place.device)
    stream = EvaluationStream(opened, run.config.data, place, local_batches)
    with evaluating(run.config.train, device):
        features, texts = task.encode(model.to(device).eval(), stream, queries)
        vectors, gallery = task.compose(model, features, texts, queries), unit(features)
    own = torch.arange(len(queries.pair_ids) + 1)
    reference, members = Groups(own, queries.reference), Groups.from_lists(subsets)
    _, found = top_k(vectors, gallery, NUM_RESULTS, excluded=reference)
    _, among = top_k(vectors, gallery, NUM_SUBSET_RESULTS, excluded=reference, candidates=members)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}); choose another --out") from error
    files = folder / f"recall_submission_{name}.json", folder / f"recall_subset_submission_{name}.json"
    for path, metric, rows in zip(files, ("recall", "recall_subset"), (found.tolist(), among.tolist()), strict=True):
        write_text(path, submission(metric, queries, rows))
    return files


def _members(split: Split, queries: ComposedQueries) -> list[list[int]]:
    """Returns the queries' subsets.

    Raises:
        UserError: If no submission can be made of the split.
    """
    rows, bad = split.manifest.rows, split.manifest.bad
    if queries.members is None:
        raise UserError(f"the queries of {split.path} have no subsets, so they are not CIRR's")
    if rows <= NUM_RESULTS:
        raise UserError(f"a submission has {NUM_RESULTS} names a query, but {split.path} has {rows} images")
    if bad:
        left_out = ", ".join(row.source for row in bad[:5])
        raise UserError(
            f"a submission needs every image and every pair, but {len(bad)} were left out of {split.path} "
            f"({left_out}); mend them and convert again without --max-bad"
        )
    return queries.members


def submission(metric: str, queries: ComposedQueries, rows: Sequence[Sequence[int]]) -> str:
    """Returns the text of a file: version, metric, and for every pair the names of the images found, best first.

    Args:
        metric: ``recall`` or ``recall_subset``.
        queries: Q queries.
        rows: Q lists of gallery rows.

    Raises:
        UserError: If two queries have one pair id; the server counts pairs.
    """
    answers = {
        str(int(pair)): [queries.names[row] for row in found]
        for pair, found in zip(queries.pair_ids, rows, strict=True)
    }
    if len(answers) != len(queries.pair_ids):
        raise UserError(f"the pair ids of {queries.origin} must differ; convert the split again")
    return json.dumps({"version": "rc2", "metric": metric, **answers}, sort_keys=True)
