"""What an evaluation of ViTP finds: the loss on held-out talks, answers by kind of question, Top-1 of the vectors."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image

from harma_ray.data.kinds.drawing import LINE, MARGIN, THUMBNAIL, paste, write
from harma_ray.data.kinds.talks import IMAGE_MARK
from harma_ray.data.order import IndexedSplit, read_samples
from harma_ray.data.splits import Split, index_rows
from harma_ray.data.stream import EvaluationStream
from harma_ray.distributed import gather_rows, sum_over_ranks
from harma_ray.evaluation import Evaluation, Projection, Section
from harma_ray.models.internvl.marks import IGNORED
from harma_ray.models.internvl.model import VisualInstructionModel
from harma_ray.recipes.vitp.config import VitpConfig
from harma_ray.recipes.vitp.talks import QuestionTransform, TalkReader, TalkTransform, question_of
from harma_ray.report import page
from harma_ray.report.by_class import Pictured, gallery_projection, neighbours_sheet, retrieval_sections
from harma_ray.report.image_text import queries_section
from harma_ray.report.pictures import read_thumbs
from harma_ray.retrieval.by_class import ByClassRetrieval

_DRAWN, _ACROSS, _TEXT_LINES = 12, 6, 9
_LISTED = 24
_IMAGES, _QUESTIONS = "image to images", "question"


@dataclass(frozen=True)
class Answer:
    """A question of a held-out talk, and what the model says."""

    row: int
    """Of the split."""
    kind: str
    """Name of the data set, or the kind of question."""
    question: str
    answer: str
    """The model's."""
    truth: str

    @property
    def is_right(self) -> bool:
        """Whether the answers are equal but for case, spaces and a full stop."""
        return normalised(self.answer) == normalised(self.truth)


@dataclass(frozen=True)
class VitpEvaluation(Evaluation):
    """An evaluation of ViTP, on worker 0."""

    answers: Sequence[Answer] = ()
    """Of all workers' questions."""
    retrieval: ByClassRetrieval | None = None
    """By the vision transformer's vectors, if there is labelled data."""
    labelled: tuple[Split, Split] | None = None
    """That data: the gallery's images and the queries'."""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Returns 95 % intervals of the metrics by class."""
        return {} if self.retrieval is None else self.retrieval.result.intervals()

    def resampled(self) -> dict[str, np.ndarray]:
        """Returns the metrics by class of bootstrap samples."""
        return {} if self.retrieval is None else self.retrieval.result.resampled()

    def first_right(self) -> dict[str, torch.Tensor]:
        """Returns the ranks of the first image of the query's class, and of answers 0 where they are right, else 1."""
        found = {} if self.retrieval is None else {_IMAGES: self.retrieval.result.ranks}
        answers = torch.tensor([int(not answer.is_right) for answer in self.answers])
        return {**found, _QUESTIONS: answers} if self.answers else found

    def show_queries(self, split: Split, kind: str, queries: Sequence[int], most: int) -> str:
        """Returns questions with their answers, or images with what was found for them."""
        if kind == _QUESTIONS:
            return _answers_table([self.answers[number] for number in queries[:most]])
        assert self.retrieval
        pictured = self._pictured()
        sheet = neighbours_sheet(self.retrieval, pictured, chosen=queries[:most]) if pictured else None
        return queries_section(sheet).html if sheet else ""

    def chance(self) -> dict[str, float]:
        """Returns the metrics by class of random rankings, and answers if all were the commonest of their kind."""
        of_features = {} if self.retrieval is None else self.retrieval.result.chance()
        table = answer_table(self.answers)
        commonest = {f"answers_{row.kind}": row.commonest for row in table}
        if table:
            commonest["answers"] = sum(row.commonest * row.asked for row in table) / len(self.answers)
        return {**of_features, **commonest}

    def picture(self, split: Split) -> Image.Image | None:
        """Draws some talks with the model's answers beside the true ones."""
        shown = self.answers[:_DRAWN]
        if not shown:
            return None
        samples = np.array([(answer.row, 0) for answer in shown])
        rows = read_samples(IndexedSplit(split, index_rows(split)), samples, epoch=0).to_pylist()
        step = THUMBNAIL + MARGIN
        height = THUMBNAIL + _TEXT_LINES * LINE + MARGIN
        sheet = Image.new("RGB", (_ACROSS * step + MARGIN, -(-len(shown) // _ACROSS) * height + MARGIN), "white")
        for number, (answer, row) in enumerate(zip(shown, rows, strict=True)):
            cell = Image.new("RGB", (step, height), "white")
            if row["images"]:
                paste(cell, row["images"][0], 0)
            top = THUMBNAIL + 2
            for text, colour in (
                (answer.question, "black"),
                (f"model: {answer.answer}", "darkgreen" if answer.is_right else "firebrick"),
                (f"true: {answer.truth}", "dimgrey"),
            ):
                top += write(cell, (0, top), text, colour, 3)
            sheet.paste(cell, (MARGIN + number % _ACROSS * step, MARGIN + number // _ACROSS * height))
        return sheet

    def projection(self, split: Split) -> Projection | None:
        """Returns vectors of the labelled gallery, if there is one."""
        if self.retrieval is None or self.labelled is None:
            return None
        return gallery_projection(self.retrieval, self.labelled[0])

    def sections(self, split: Split) -> list[Section]:
        """Returns the answers by kind of question, some of them, and what the images of labelled data found.

        Raises:
            UserError: If an image cannot be read.
        """
        found = self._answer_sections()
        if self.retrieval is not None and self.labelled is not None:
            found += retrieval_sections(self.retrieval, self._pictured())
        return found

    def _pictured(self) -> Pictured | None:
        if self.labelled is None:
            return None
        gallery, queries = (partial(read_thumbs, images) for images in self.labelled)
        return Pictured(queries, gallery)

    def _answer_sections(self) -> list[Section]:
        if not self.answers:
            return []
        rows = answer_table(self.answers)
        columns = [
            ("question", [row.kind for row in rows]),
            ("asked", [f"{row.asked:,}" for row in rows]),
            ("right (%)", [f"{row.right:.1f}" for row in rows]),
            ("always the commonest (%)", [f"{row.commonest:.1f}" for row in rows]),
        ]
        return [
            Section("answers", "Answers by kind of question", page.table(columns, num_text_columns=1)),
            Section("talks", "Some answers", _answers_table(self.answers[:_LISTED])),
        ]


def _answers_table(answers: Sequence[Answer]) -> str:
    columns = [
        ("kind", [answer.kind for answer in answers]),
        ("question", [answer.question for answer in answers]),
        ("answer", [answer.answer for answer in answers]),
        ("true answer", [answer.truth for answer in answers]),
    ]
    return page.table(columns, num_text_columns=len(columns))


def normalised(answer: str) -> str:
    """Returns an answer in small letters, without spaces around it and a full stop at its end."""
    return " ".join(answer.lower().split()).removesuffix(".")


@dataclass(frozen=True)
class KindFigures:
    """What was found for one kind of question."""

    kind: str
    asked: int
    right: float
    """Answers that are right, in percent."""
    commonest: float
    """What would be right if all were the commonest one of the questions themselves, in percent: no answer without a
    look at the image does better."""


def answer_table(answers: Sequence[Answer]) -> list[KindFigures]:
    """Returns the figures of each kind of question."""
    rows = []
    for kind in sorted({answer.kind for answer in answers}):
        own = [answer for answer in answers if answer.kind == kind]
        commonest = Counter(normalised(answer.truth) for answer in own).most_common(1)[0][1]
        right = sum(answer.is_right for answer in own)
        rows.append(KindFigures(kind, len(own), 100 * right / len(own), 100 * commonest / len(own)))
    return rows


def loss_on_talks(
    model: VisualInstructionModel, data: EvaluationStream, reader: TalkReader, batch_size: int
) -> dict[str, float]:
    """Returns ``loss``, the mean over all supervised tokens of a split, and ``token_accuracy`` in percent."""
    device = next(model.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for batch in data.batches(TalkTransform(reader, training=False), batch_size=batch_size):
        found = model(batch["pixels"], batch["ids"], batch["mask"], batch["labels"])
        count = (batch["labels"][:, 1:] != IGNORED).sum().to(device)
        sums += torch.stack([found["loss"] * count, found["right"], count]).double()
    total, right, count = sum_over_ranks(sums).tolist()
    return {"loss": total / count, "token_accuracy": 100 * right / count}


def answer_questions(
    model: VisualInstructionModel, data: EvaluationStream, reader: TalkReader, config: VitpConfig
) -> list[Answer]:
    """Answers the first question of some talks of a split; called on every worker, all get all answers."""
    selection = config.selection
    if not selection.answers:
        return []
    lines = b""
    tokenizer = reader.backbone.tokenizer()
    asked = data.over(data.split, max_rows=selection.answers)
    for batch in asked.batches(QuestionTransform(reader, training=False), batch_size=config.train.eval_batch_size):
        ids = model.answer(batch["pixels"], batch["ids"], batch["mask"], selection.answer_tokens)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        for row, text in zip(batch["row"].tolist(), texts, strict=True):
            lines += json.dumps([row, text.strip()]).encode() + b"\n"
    device = next(model.parameters()).device
    own = torch.frombuffer(bytearray(lines or b"\n"), dtype=torch.uint8).to(device)
    found = dict(json.loads(line) for line in bytes(gather_rows(own).tolist()).splitlines() if line)
    answers = []
    for row, talk in enumerate(data.table(["dataset", "conversations"]).slice(0, len(found)).to_pylist()):
        first, truth = question_of(talk["conversations"])
        question = talk["conversations"][first]["value"].replace(IMAGE_MARK, "").strip()
        answers.append(Answer(row, talk["dataset"], question, found[row], truth))
    return answers


def evaluate_talks(
    model: VisualInstructionModel, data: EvaluationStream, reader: TalkReader, config: VitpConfig
) -> VitpEvaluation:
    """Returns the loss of a split and, if they are asked for, answers."""
    metrics = loss_on_talks(model, data, reader, config.train.eval_batch_size)
    answers = answer_questions(model, data, reader, config)
    if answers:
        metrics["answers"] = 100 * sum(answer.is_right for answer in answers) / len(answers)
        metrics |= {f"answers_{row.kind}": row.right for row in answer_table(answers)}
    return VitpEvaluation(metrics, answers=answers)
