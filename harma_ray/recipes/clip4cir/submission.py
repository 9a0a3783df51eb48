"""Answers to queries whose targets are not public, as the evaluation server of CIRR wants them."""

import json
from collections.abc import Callable, Sequence
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
from harma_ray.recipes.clip4cir.commands import QUERIES
from harma_ray.recipes.clip4cir.queries import compose
from harma_ray.recipes.clip4cir.task import Clip4CirTask
from harma_ray.retrieval.groups import Groups
from harma_ray.retrieval.ranking import top_k
from harma_ray.task import Task, require_query
from harma_ray.training.step import local_worker

NUM_RESULTS, NUM_SUBSET_RESULTS = 50, 3
"""Names that a query has in the two files."""


def predict_cirr(
    task: Task, load: Callable[[], nn.Module], split: str, out: str | Path, name: str, *, query: str | None = None
) -> tuple[list[Path], str]:
    """Writes the two files of a submission to CIRR's server.

    Args:
        task: CLIP4Cir's, either stage; ``data.path`` of its settings is the converted data set.
        load: Gives the model that answers, in evaluation mode; called once the split is known to fit.
        split: The split with the queries.
        out: Folder of the files; made if missing.
        name: Last part of their names; empty = that of the pretrained weights.
        query: How queries are made; None = the model's own way.

    Returns:
        ``recall_submission_NAME.json`` and ``recall_subset_submission_NAME.json``, and how the queries were made.

    Raises:
        UserError: If settings, split or weights do not fit, the split lacks rows, or nothing can be written.
    """
    config = task.config
    if not isinstance(task, Clip4CirTask):
        raise UserError(f"recipe {config.recipe} has no composed queries; give a run or a recipe of CLIP4Cir")
    name = name or Path(task.config.model.pretrained).stem
    if name != Path(name).name:
        raise UserError(f"`--name` must be a plain part of a file's name, got `{name}`")
    opened = open_split(config.data.path, split)
    task.check_evaluated(opened)
    queries = ComposedQueries.of(opened)
    subsets = Groups.from_lists(_members(opened, queries))
    folder, model, worker = output_path(out), load(), local_worker(config)
    assert isinstance(model, ComposedRetriever)
    query = query or task.queries(model)[0]
    require_query(task, model, query)
    device = torch.device(worker.device)
    stream = EvaluationStream(opened, config.data, worker, local_batches)
    with evaluating(config.train.eval_precision, device):
        features, texts = task.encode(model.to(device).eval(), stream, queries)
        references = features[queries.reference]
        vectors = compose(model, references, texts, query, batch_size=config.train.eval_batch_size)
        gallery = unit(features)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}); choose another --out") from error
    files = []
    for metric, count, candidates in (("recall", NUM_RESULTS, None), ("recall_subset", NUM_SUBSET_RESULTS, subsets)):
        _, found = top_k(vectors, gallery, count, excluded=Groups.one_each(queries.reference), candidates=candidates)
        files.append(folder / f"{metric}_submission_{name}.json")
        write_text(files[-1], submission(metric, queries, found.tolist()))
    return files, f"queries: {QUERIES[query]}"


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
