"""What is wrong with a command is told before torch and Ray are imported, which takes seconds."""

import json
import shutil
import subprocess
import sys

import pytest
from command_line import ROOT, SMALL_SPACE, alone, refused
from safetensors.numpy import save_file

from harma_ray.models.names import OWN_FORMAT
from harma_ray.resources import has_driver
from harma_ray.runs import lock_folder

CODE = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO
from harma_ray import cli, resources
from harma_ray.cli import early_checks
early_checks.has_driver = lambda: False
for arguments in json.loads(sys.argv[1]):
    with redirect_stderr(StringIO()) as told:
        status = cli.main(arguments)
    heavy = [name for name in ("torch", "ray", "open_clip") if sys.modules.pop(name, None)]
    print(json.dumps([status, told.getvalue(), heavy]))
"""

SPACES = {
    "unnamed": ("recipe: harma-scenes\nspace: {adapter.width: {choices: [128, 64]}}", "its weights must be named"),
    "unknown": ("recipe: harma-scenes\nspace: {adapter.widht: {choices: [128]}}", "did you mean `adapter.width`?"),
    "kind": ("recipe: harma-scenes\nspace: {adapter.width: {type: x, low: 8, high: 9}}", "must be 'float' or 'int'"),
    "swapped": (
        "recipe: harma-scenes\nspace: {adapter.width: {type: int, low: 9, high: 8}}",
        "`low` must not be above",
    ),
    "recipe": ("recipe: harma-scnes\nspace: {adapter.width: {choices: [128]}}", "did you mean `harma-scenes`?"),
    "syntax": ("recipe: {", "this YAML cannot be read"),
    "metric": ("recipe: scenes-vitp\nspace: {seed: {choices: [0]}}\nobjective: los", "did you mean `loss`?"),
}
"""Search spaces with a mistake, and what is told of each."""


def mistakes(tmp_path, data, composed, run, unfinished, training, search, space):
    train = ["train", "--recipe", "harma-scenes", "--data", data]
    random = ["--set", "model.pretrained=random"]
    gone, adapter = ["--recipe", "harma-scenes", "--data", data, "--set", "model.pretrained=gone.pt"], tmp_path / "a"
    save_file({}, adapter, metadata={"format": OWN_FORMAT})
    (tmp_path / "epochs.yaml").write_text("recipe: scenes-vitp\ntrain: {epochs: 5}")
    export = ["checkpoint", "export", "--run", run, "--format"]
    combiner = ["train", "--recipe", "scenes-cir-combiner", "--data", data]
    vitp = ["train", "--recipe", "scenes-vitp", "--data", data]
    return [
        ("is not the folder of a run", ["train", "--resume", tmp_path]),
        (f"run {training} is in use: another process trains it", ["train", "--resume", training]),
        ("the data set", ["train", "--resume", unfinished, "--data", tmp_path / "gone"]),
        (f"did you mean {run}?", ["train", "--resume", run.with_name("randmo")]),
        (f"did you mean {run}?", ["evaluate", "--run", run / "checkpoints"]),
        (f"did you mean {data}?", ["train", "--resume", unfinished, "--data", data / "train"]),
        (f"did you mean {data}?", ["train", "--recipe", "harma-scenes", "--data", data / "train"]),
        (f"did you mean {data}?", ["embed", "--run", run, "--data", data / "val", "--out", tmp_path / "vectors"]),
        ("did you mean `test`?", ["evaluate", "--run", run, "--split", "tset"]),
        (f"did you mean {search}?", ["tune", "report", tmp_path / "serach"]),
        ("unknown recipe `harma`; ", ["train", "--recipe", "harma", "--data", data]),
        ("did you mean `optim.learning_rate`", [*train, "--set", "learning_rate=1"]),
        ("must be at least 0, got -1", [*train, "--set", "train.epochs=-1"]),
        ("no data set is given", ["train", "--recipe", "harma-scenes"]),
        ("does not exist; make one", ["train", "--recipe", "harma-scenes", "--data", tmp_path / "gone"]),
        ("has no split `train`", ["train", "--recipe", "harma-scenes", "--data", tmp_path]),
        (f"run {run} exists", [*train, "--runs", run.parent, "--name", run.name]),
        ("must be a plain folder name", [*train, "--name", "a/b"]),
        ("is no folder; choose another --runs", [*train, "--runs", run / "config.yaml"]),
        ("has no driver of one", [*train, "--gpu"]),
        ("has no driver of one; use", ["evaluate", "--run", run, "--gpu"]),
        ("keeps the backbone frozen, so its weights must be named", train),
        ("there is no such file", [*train, "--set", "model.pretrained=gone.pt"]),
        ("give --from RUN, or", combiner),
        ("is not a checkpoint of a run", [*combiner, "--set", "model.tuned=gone"]),
        ("there is no such file", [*combiner, "--set", "model.pretrained=~/gone.pt"]),
        ("starts from a model whose weights must be named", ["train", "--recipe", "vitp-internvl-1b", "--data", data]),
        ("gone must be a folder with config.json", [*vitp, "--set", "model.pretrained=gone"]),
        ("gone must hold weights in", [*vitp, "--set", "model.vision=gone"]),
        ("gone does not exist; make one", [*vitp, "--set", "features.data=gone"]),
        ("keeps the backbone frozen", ["evaluate", "--zero-shot", "--recipe", "harma-scenes", "--data", data]),
        ("gone.pt' for `scenes-tiny`; there is no such file", ["evaluate", "--run", unfinished]),
        ("gone.pt' for `scenes-tiny`; there is no such file", ["evaluate", "--run", run, "--compare", unfinished]),
        ("gone.pt' for `scenes-tiny`", ["embed", "--run", unfinished, "--data", data, "--out", tmp_path / "vectors"]),
        ("gone.pt' for", ["checkpoint", "export", "--run", unfinished, "--format", "adapter", "--out", tmp_path / "x"]),
        ("cannot read gone.yaml", ["train", "--config", "gone.yaml", "--data", data]),
        ("is not the folder of a run (it", [*train, "--from", tmp_path]),
        ("models have nothing in common", [*vitp, "--from", run]),
        ("must not exceed the 200 pairs of", [*train, *random, "--set", "train.global_batch_size=201"]),
        ("the 40 triplets of an epoch of", [*combiner[:4], composed, *random]),
        ("search space", ["tune", "gone.yaml", "--data", data]),
        (f"search {run} exists", ["tune", "quick", "--data", data, "--runs", run.parent, "--name", run.name]),
        ("data set folder", ["tune", "quick", "--data", tmp_path / "gone"]),
        (f"search, but of a run; go on with it: python launch.py train --resume {run}", ["tune", "--resume", run]),
        ("is not the folder of a search, but of a run", ["tune", "report", run]),
        ("is not the folder of a search (", ["tune", "report", tmp_path]),
        (
            f"run, but of a search; go on with it: python launch.py tune --resume {search}",
            ["train", "--resume", search],
        ),
        ("is not the folder of a run, but of a search", ["evaluate", "--run", search]),
        *((told, ["tune", tmp_path / f"{name}.yaml", "--data", data]) for name, (_, told) in SPACES.items()),
        (f"did you mean {tmp_path / 'kind.yaml'}?", ["tune", tmp_path / "kinds.yaml", "--data", data]),
        ("this search counts epochs", ["tune", space, "--data", data, "--steps", "9"]),
        ("there is no such file", ["tune", space, "--data", data, "--set", "model.pretrained=gone.pt"]),
        (f"did you mean {data}?", ["tune", space, "--data", data / "train"]),
        (f"the data set {data / 'gone'} of search", ["tune", "--resume", search, "--data", data / "gone"]),
        (f"search {search} is in use: another process goes on with it", ["tune", "--resume", search]),
        ("not the folder of a run (it", ["evaluate", "--run", tmp_path]),
        ("no weights are there", ["evaluate", "--checkpoint", "gone.pth", "--recipe", "harma-scenes", "--data", data]),
        ("has no split `x`", ["evaluate", "--run", run, "--split", "x"]),
        ("has no split `test1`", ["predict", "cirr-test", "--run", run, "--data", data]),
        ("not the folder of a run", ["embed", "--run", tmp_path, "--data", data, "--out", tmp_path / "vectors"]),
        ("give a converted data set", ["embed", "--run", run, "--data", "gone", "--out", tmp_path / "vectors"]),
        ("exists; choose another --out", ["embed", "--run", run, "--data", data, "--out", tmp_path]),
        ("give an image file", ["generate", "--run", run, "--image", "gone.png", "what?"]),
        ("give a folder that `launch.py embed` wrote", ["retrieve", "--query", "gone", "--gallery", "gone"]),
        ("give a file, a checkpoint's folder", ["checkpoint", "show", "gone.pt"]),
        (
            "give a file or folder of weights",
            ["checkpoint", "import", "gone", "--recipe", "harma-scenes", "--out", "x"],
        ),
        ("not the folder of a run (", ["checkpoint", "export", "--run", tmp_path, "--format", "adapter", "--out", "x"]),
        ("`train.epochs` has no effect, because", [*vitp, "--set", "train.epochs=5"]),
        ("`train.eval_every_epochs` has no effect", [*vitp, "--set", "train.eval_every_epochs=2"]),
        ("/epochs.yaml: `train.epochs` has no", ["train", "--config", tmp_path / "epochs.yaml", "--data", data]),
        ("gone.pt' for `scenes-tiny`", ["evaluate", *gone, "--checkpoint", adapter]),
        ("gone.pt' for `scenes-tiny`", ["evaluate", *gone, "--checkpoint", next((run / "checkpoints").iterdir())]),
        ("a folder that no export made", [*export, "adapter", "--out", tmp_path, "--overwrite"]),
        ("/space.yaml exists; choose", [*export, "adapter", "--out", space]),
        ("whose GELU and attention no weight of", [*export, "open_clip", "--out", tmp_path / "x"]),
        ("are for --format huggingface", [*export, "adapter", "--out", tmp_path / "x", "--backbone", "name"]),
        ("exists; choose another --out", ["checkpoint", "extract-vit", "--run", run, "--out", tmp_path]),
        ("`--workers` must be at least 1, got 0", ["demo", "vitp", "--out", tmp_path / "demo", "--workers", "0"]),
        ("`seed` must be at least 0, got -1", ["demo", "cir", "--out", tmp_path / "demo", "--seed", "-1"]),
        ("is no folder; choose another --out", ["demo", "--out", space]),
        ("annotation file", ["convert", "karpathy", "--annotations", "gone", "--images", ".", "--out", tmp_path / "x"]),
    ]


@pytest.mark.timeout(120)
def test_mistakes_are_told_without_torch_and_ray(scenes, composed, random_run, tmp_path):
    run, unfinished = random_run.path, shutil.copytree(random_run.path, tmp_path / "unfinished")
    training, search = shutil.copytree(unfinished, tmp_path / "training"), tmp_path / "search"
    (unfinished / "report.json").unlink(missing_ok=True)
    (training / "report.json").unlink(missing_ok=True)
    settings = (unfinished / "config.yaml").read_text()
    (unfinished / "config.yaml").write_text(settings.replace("pretrained: ''", "pretrained: /gone.pt"))
    search.mkdir()
    space = tmp_path / "space.yaml"
    space.write_text(SMALL_SPACE)
    (search / "search.yaml").write_text(SMALL_SPACE.replace("fixed: {", f"fixed: {{data.path: {scenes}, "))
    for name, (text, _) in SPACES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    cases = mistakes(tmp_path, scenes, composed, run, unfinished, training, search, space)
    asked = json.dumps([list(map(str, arguments)) for _, arguments in cases])
    with lock_folder(training), lock_folder(search, "search"):
        command = [sys.executable, "-c", CODE, asked]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=alone(), timeout=100)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [
        (told, answer)
        for (told, _), answer in zip(cases, answers, strict=True)
        if answer[0] != 2 or told not in answer[1] or answer[2]
    ] == []


def test_a_driver_is_there_where_torch_finds_a_gpu():
    import torch

    assert has_driver() or not torch.cuda.is_available()


def test_a_cluster_that_is_joined_knows_its_gpus_itself(capsys, monkeypatch, scenes, tmp_path):
    monkeypatch.setattr("harma_ray.cli.early_checks.has_driver", lambda: False)
    train = ["train", "--recipe", "harma-scenes", "--data", scenes, "--set", "model.pretrained=random", "--gpu"]
    assert "has no driver" in refused(capsys, *train, "--runs", tmp_path)
    assert "an address of Ray Client" in refused(capsys, *train, "--runs", tmp_path, "--address", "ray://head:10001")
