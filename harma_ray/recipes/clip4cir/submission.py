"""Answers to queries whose targets are not public, as the evaluation server of CIRR wants them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from harma_ray.data.queries import ComposedQueries
from harma_ray.data.splits import Split, open_split
from harma_ray.data.stream import EvaluationStream, local_batches
from harma_ray.errors import UserError
from harma_ray.files import output_path, write_text
from harma_ray.models.clip import unit
from harma_ray.models.composed import ComposedRetriever
from harma_ray.models.precision import evaluating
from harma_ray.recipes.clip4cir.queries import compose
from harma_ray.recipes.clip4cir.task import Clip4CirTask
from harma_ray.retrieval.ranking import Groups, top_k
from harma_ray.task import Task, require_query
from harma_ray.training.step import local_worker

NUM_RESULTS, NUM_SUBSET_RESULTS = 50, 3
"""Names that a query has in the two files."""


@dataclass(frozen=True)
class Submission:
    """What was written."""

    files: tuple[Path, Path]
    """``recall_submission_NAME.json`` and ``recall_subset_submission_NAME.json``."""
    query: str
    """How the queries were made; see `harma_ray.recipes.clip4cir.queries.QUERIES`."""


def predict_cirr(
    task: Task, load: Callable[[], nn.Module], split: str, out: str | Path, name: str, *, query: str | None = None
) -> Submission:
    """Writes the two files of a submission to CIRR's server.

    Args:
        task: CLIP4Cir's, either stage; ``data.path`` of its settings is the converted data set.
        load: Gives the model that answers, in evaluation mode; called once the split is known to fit.
        split: The split with the queries.
        out: Folder of the files; made if missing.
        name: Last part of their names.
        query: How queries are made; None = the model's own way.

    Raises:
        UserError: If the settings or the split are of another kind, the weights do not fit, the split lacks images or
            queries of the data set, the gallery is too small for a submission, or the files cannot be written.
    """
    config = task.config
    if not isinstance(task, Clip4CirTask):
        raise UserError(f"recipe {config.recipe} has no composed queries; give a run or a recipe of CLIP4Cir")
    if name != Path(name).name:
        raise UserError(f"`--name` must be a plain part of a file's name, got `{name}`")
    opened = open_split(config.data.path, split)
    task.check_evaluated(opened)
    queries = ComposedQueries.of(opened)
    subsets = _members(opened, queries)
    folder, model, worker = output_path(out), load(), local_worker(config)
    assert isinstance(model, ComposedRetriever)
    query = query or task.queries(model)[0]
    require_query(task, model, query)
    device = torch.device(worker.device)
    stream = EvaluationStream(opened, config.data, worker, local_batches)
    with evaluating(config.train.eval_precision, device):
        features, texts = task.encode(model.to(device).eval(), stream, queries)
        vectors = compose(model, features, texts, queries, query, batch_size=config.train.eval_batch_size)
        gallery = unit(features)
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
    return Submission(files, query)


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
