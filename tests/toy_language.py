"""A generative task in miniature: the next letter of a caption, with a loss as its objective."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from harma_ray.config import OptimConfig, RunConfig, TrainConfig
from harma_ray.data.samples import RowTransform
from harma_ray.distributed import sum_over_ranks
from harma_ray.evaluation import Evaluation, Metrics
from harma_ray.models.backbones import Backbone
from harma_ray.parallel import shard
from harma_ray.task import Task

NUM_LETTERS = 128


@dataclass(frozen=True, kw_only=True)
class ToyConfig(RunConfig):
    """Settings of the toy."""

    built_on_clip = False

    @property
    def metrics(self):
        return Metrics(("loss", "right"), objective="loss", lower_is_better=("loss", "error"))


def toy_config():
    optim = OptimConfig(learning_rate=0.01, warmup_fraction=0)
    return ToyConfig(recipe="toy", optim=optim, train=TrainConfig(epochs=2, global_batch_size=20, log_every_steps=1))


class Letters(nn.Module):
    """Scores of the next letter after each."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = nn.Embedding(NUM_LETTERS, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, NUM_LETTERS)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, letters):
        x = self.embedding(letters)
        for block in self.blocks:
            x = x + block(x).tanh()
        return {"scores": self.head(x)}


class LettersBackbone(Backbone):
    """No pretrained part at all."""

    name = "letters"
    image_size = 8
    pixel_statistics = (0.5,) * 3, (0.5,) * 3

    def tokenizer(self):
        raise NotImplementedError("letters are told apart without a tokenizer")

    def build(self):
        return Letters()

    def outline(self):
        return Letters().to("meta")

    def fingerprint(self, model):
        return "letters"


class FirstLetters(RowTransform):
    """The first 12 letters of a caption, as often as the row has captions."""

    def __call__(self, row, rng):
        text = row["captions"][row["caption"]]
        return {"letters": np.frombuffer(text.encode("ascii")[:12].ljust(12), np.uint8).astype(np.int64)}


class ToyTask(Task[ToyConfig, Letters]):
    """Learns which letter follows which."""

    def __init__(self, config):
        super().__init__(config)
        self.metrics = config.metrics
        self.backbone = LettersBackbone()

    def build_model(self, backbone):
        return backbone

    def transform(self, *, training):
        return FirstLetters()

    def losses(self, model, batch):
        scores = model(batch["letters"])["scores"][:, :-1]
        return {"letters": nn.functional.cross_entropy(scores.flatten(0, 1), batch["letters"][:, 1:].flatten())}

    def evaluate(self, model, data):
        total = count = right = 0.0
        for batch in data.batches(self.transform(training=False), batch_size=4):
            scores, letters = model(batch["letters"])["scores"][:, :-1].flatten(0, 1), batch["letters"][:, 1:].flatten()
            total += float(nn.functional.cross_entropy(scores, letters, reduction="sum"))
            count, right = count + len(letters), right + float((scores.argmax(1) == letters).sum())
        return Evaluation({"loss": total / count, "right": 100 * right / count})


def register(monkeypatch, task=ToyTask):
    """Makes the toy a recipe for the length of a test."""
    from harma_ray.recipes import RECIPES
    from harma_ray.recipes.tasks import TASKS

    monkeypatch.setitem(RECIPES, "toy", toy_config)
    monkeypatch.setitem(TASKS, ToyConfig, task)


class WholeCaption(RowTransform):
    """All letters of a caption; a batch has them end to end, without a dimension for the samples."""

    def __call__(self, row, rng):
        return {"letters": np.frombuffer(row["captions"][row["caption"]].encode("ascii"), np.uint8).astype(np.int64)}

    def collate(self, samples):
        letters = [sample["letters"] for sample in samples]
        # the first letter of a caption does not follow from the last one of another
        targets = [np.concatenate([text[1:], [-100]]) for text in letters]
        return {"letters": np.concatenate(letters), "targets": np.concatenate(targets)}


class PackedTask(ToyTask):
    """The same over whole captions: samples of different lengths, a loss that is a mean over letters."""

    accumulation = "summed"

    def transform(self, *, training):
        return WholeCaption()

    def losses(self, model, batch):
        scores = model(batch["letters"])["scores"]
        return {"letters": nn.functional.cross_entropy(scores, batch["targets"])}

    def counted(self, batch):
        return (batch["targets"] != -100).sum()

    def amounts(self, batch):
        return {"tokens": torch.tensor(len(batch["letters"]))}

    def evaluate(self, model, data):
        total = count = 0.0
        for batch in data.batches(self.transform(training=False), batch_size=3):
            losses = nn.functional.cross_entropy(model(batch["letters"])["scores"], batch["targets"], reduction="sum")
            total, count = total + float(losses), count + float(self.counted(batch))
        total, count = sum_over_ranks(torch.tensor([total, count])).tolist()
        return Evaluation({"loss": total / count})


class SpreadTask(PackedTask):
    """The same, its parameters spread over the workers."""

    def parallelise(self, model, worker):
        return shard(model, model.blocks, worker.device)
