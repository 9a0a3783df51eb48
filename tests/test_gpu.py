"""What needs a GPU: the same training there, in bf16, resumed, by commands; figures as on the CPU."""

import inspect
import warnings
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from command_line import launch

from harma_ray.config import TrainConfig
from harma_ray.data.convert.commands import convert_scenes_talk
from harma_ray.data.images import open_image
from harma_ray.data.order import planned_order
from harma_ray.data.stream import TrainingStream, Worker, local_batches
from harma_ray.import_export import load_model
from harma_ray.models.precision import evaluating
from harma_ray.models.recording import RecordedEncoder
from harma_ray.parallel import replicate, shard, whole
from harma_ray.recipes import make_task, recipe_config
from harma_ray.settings import build_config
from harma_ray.training.checkpoint import list_checkpoints
from harma_ray.training.divergence import TrainingDiverged
from harma_ray.training.loop import run_training
from harma_ray.training.optim import checked_groups
from harma_ray.training.state import TrainState
from harma_ray.training.step import autocast_of, evaluate_split, num_batches, train_step, update_weights
from harma_ray.training.tracking import read_records

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def config(scenes):
    small = {
        "train.global_batch_size": 20,
        "train.epochs": 2,
        "train.log_every_steps": 1,
        "data.path": str(scenes),
        "optim.learning_rate": 1e-3,
    }
    return build_config(recipe_config("harma-scenes"), small)


def train(config, path, device, callback=lambda metrics: None):
    worker = Worker(device=device)
    return run_training(make_task(config), config, path, worker=worker, loader=local_batches, callback=callback)


def losses(path):
    return [record["loss"] for record in read_records(path) if record["kind"] == "step"]


@pytest.fixture(scope="module")
def configs(config, composed, tmp_path_factory):
    """Short trainings of all papers."""
    talks = tmp_path_factory.mktemp("talks")
    convert_scenes_talk(talks, {"train": 32, "val": 12}, style="summer", size=64)
    short = {"train.global_batch_size": 8, "train.log_every_steps": 1, "train.epochs": 1}
    steps = {"train.steps": 3, "train.eval_every_steps": 3, "selection.answers": 0, "optim.warmup_fraction": 0}
    return {
        "harma-scenes": config,
        "scenes-cir-finetune": build_config(
            recipe_config("scenes-cir-finetune"), {**short, "data.path": str(composed), "model.pretrained": "random"}
        ),
        "scenes-vitp": build_config(
            recipe_config("scenes-vitp"), {**short, "train.epochs": 0, **steps, "data.path": str(talks)}
        ),
    }


RECIPES = ("harma-scenes", "scenes-cir-finetune", "scenes-vitp")


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_a_gpu_trains_other_papers_as_the_cpu_does(configs, tmp_path, recipe):
    exact = replace(configs[recipe], train=replace(configs[recipe].train, precision="fp32"))
    train(exact, tmp_path / "cpu", "cpu")
    train(exact, tmp_path / "gpu", "cuda")
    assert losses(tmp_path / "gpu")[:3] == pytest.approx(losses(tmp_path / "cpu")[:3], rel=1e-2)


def steps_of(config, prepare=lambda model: model):
    """Returns a model on the GPU, and functions that read a step's batches and take its passes."""
    task, device = make_task(config), torch.device("cuda")
    model = task.new_model().to(device).train()
    forward = prepare(model)
    stream = TrainingStream(
        planned_order(config), task.transform(training=True), config.data, Worker(device="cuda"), local_batches
    )
    parts = num_batches(task)
    batches = stream.steps(0, 10, parts)

    def passes(batch, step=0):
        task.begin_step(step)
        return train_step(task, forward, batch, config.train, autocast_of(config.train, device))

    return model, lambda: [next(batches) for _ in range(parts)], passes


def mover_of(config, model):
    """Returns what moves the weights of a training."""
    state = TrainState(checked_groups(make_task(config), model), config, 10, Worker(device="cuda"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return lambda losses: update_weights(state, trained, losses, config.optim)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_step_waits_for_the_gpu(configs, recipe):
    task, prepare = make_task(configs[recipe]), lambda model: task.quicken(model, torch.device("cuda"))
    model, read, passes = steps_of(configs[recipe], prepare)
    move = mover_of(configs[recipe], model)
    batch = read()
    for step in range(2):
        move(passes(batch, step))
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            move(passes(batch, 2))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in found if "called a synchronizing" in str(warning.message)]
    assert [f"{warning.filename}:{warning.lineno}" for warning in waits] == []


def test_a_step_that_is_not_finite_moves_nothing_and_is_told_by_the_next(configs):
    config = configs["harma-scenes"]
    model, read, passes = steps_of(config)
    move = mover_of(config, model)
    move(passes(read()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = passes(read())
    next(p for p in model.parameters() if p.requires_grad and p.grad is not None).grad.fill_(torch.inf)
    move(losses)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(TrainingDiverged, match=r"not finite at step 2 on worker 0 \(contrastive=.*grad_norm=(inf|nan)"):
        move(passes(read()))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("text_tokens", ["full", "trim"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("captions", ["all", "grouped"])
def test_recorded_passes_train_as_those_that_are_launched(config, tmp_path, text_tokens, precision, captions):
    exact = build_config(
        config,
        {"model.text_tokens": text_tokens, "train.precision": precision, "train.captions": captions, "train.epochs": 1},
    )
    plain = replace(exact, train=replace(exact.train, cuda_graphs=False))
    found = {}
    for name, settings in (("recorded", exact), ("plain", plain)):
        train(settings, tmp_path / name, "cuda")
        found[name] = losses(tmp_path / name)
    assert len(set(found["plain"])) > 3
    assert found["recorded"] == pytest.approx(found["plain"], rel=1e-3 if precision == "fp32" else 5e-2)


@pytest.fixture
def one_rank():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["replicate", "shard"])
def test_one_rank_of_nccl_gives_the_gradients_of_a_plain_model(configs, one_rank, way):
    recipe = "scenes-vitp" if way == "shard" else "harma-scenes"
    exact = replace(configs[recipe], train=replace(configs[recipe].train, precision="fp32"))
    if (
        way == "replicate"
        and "forward_sync_buffers" not in inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    ):
        pytest.skip("torch before 2.14, which the package needs, has no `forward_sync_buffers` in DDP")
    prepare = {"replicate": lambda model: replicate(model, "cuda"), "shard": lambda model: shard(model, [], "cuda")}
    plain, read, passes = steps_of(exact)
    other, read_too, passes_too = steps_of(exact, prepare[way])
    expected, found = passes(read()), passes_too(read_too())
    for name, loss in expected.items():
        torch.testing.assert_close(whole(found[name]), loss, rtol=1e-4, atol=1e-6)
    there = dict(other.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(whole(there[name].grad), parameter.grad, rtol=1e-3, atol=1e-5)


def test_recorded_passes_give_their_gradients_to_several_workers(config, one_rank):
    """As `replicate` wraps them, less what needs torch 2.14."""
    exact = replace(config, train=replace(config.train, precision="fp32"))
    workers = torch.nn.parallel.DistributedDataParallel
    plain, read, passes = steps_of(exact)
    other, read_too, passes_too = steps_of(
        exact, lambda model: workers(RecordedEncoder(model), gradient_as_bucket_view=True)
    )
    for _ in range(3):
        plain.zero_grad(), other.zero_grad()
        expected, found = passes(read()), passes_too(read_too())
        for name, loss in expected.items():
            torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-6)
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(other.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_a_compiled_model_trains_as_it_does_otherwise(config, tmp_path):
    exact = replace(config, train=replace(config.train, precision="fp32"))
    train(exact, tmp_path / "plain", "cuda")
    train(replace(exact, train=replace(exact.train, compile=True)), tmp_path / "compiled", "cuda")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-2)


@pytest.mark.ray
def test_commands_use_the_gpu(scenes, tmp_path):
    small = ["--set", "model.pretrained=random", "--set", "train.global_batch_size=20"]
    begun = launch(
        "train", "--recipe", "harma-scenes", "--data", scenes, "--runs", tmp_path, "--name", "there", *small,
        "--set", "train.epochs=2", "--set", "train.log_every_steps=1",
    )  # fmt: skip
    assert begun.returncode == 0, begun.stderr
    assert "bf16" in begun.stdout
    steps = [record for record in read_records(tmp_path / "there") if record["kind"] == "step"]
    assert all(record["gpu_memory_mb"] > 0 for record in steps)
    found = []
    for where in ("--gpu", "--cpu"):
        told = launch("evaluate", "--run", tmp_path / "there", "--split", "val", where)
        assert told.returncode == 0, told.stderr
        found.append([line for line in told.stdout.splitlines() if "r_mean" in line])
    assert found[0] == found[1]
    vectors = tmp_path / "vectors"
    made = launch("embed", "--run", tmp_path / "there", "--data", scenes, "--split", "val", "--out", vectors, "--gpu")
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-2), ("auto", 5e-2)])
def test_a_gpu_trains_as_the_cpu_does(config, tmp_path, precision, tolerance):
    there = replace(config, train=replace(config.train, precision=precision))
    train(config, tmp_path / "cpu", "cpu")
    train(there, tmp_path / "gpu", "cuda")
    assert losses(tmp_path / "gpu")[:5] == pytest.approx(losses(tmp_path / "cpu")[:5], rel=tolerance)
    assert all(record["gpu_memory_mb"] > 0 for record in read_records(tmp_path / "gpu") if record["kind"] == "step")


def test_a_run_resumes_on_a_gpu(config, tmp_path):
    def stop(metrics):
        if metrics["epoch"] == 1:
            raise Stop

    train(config, tmp_path / "whole", "cuda")
    with pytest.raises(Stop):
        train(config, tmp_path / "parts", "cuda", stop)
    train(config, tmp_path / "parts", "cuda")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)


def test_weights_from_a_gpu_give_the_same_figures_on_the_cpu(config, tmp_path):
    exact = replace(config, train=replace(config.train, precision="fp32"))
    train(exact, tmp_path, "cuda")
    weights = list_checkpoints(tmp_path)[-1]
    metrics = [evaluate(exact, weights, device).metrics["r_mean"] for device in ("cpu", "cuda")]
    assert metrics[1] == pytest.approx(metrics[0], abs=2.0)


def evaluate(config, weights, device):
    model, worker = load_model(weights, config), Worker(device=device)
    return evaluate_split(make_task(config), config, model, "val", worker=worker, loader=local_batches)


def test_figures_on_a_gpu_are_fp32_unless_bf16_is_asked_for(config, tmp_path):
    train(config, tmp_path, "cuda")  # in bf16, where the GPU has it
    weights = list_checkpoints(tmp_path)[-1]
    rough = replace(config, train=replace(config.train, eval_precision="bf16"))
    on_cpu, on_gpu, in_bf16 = (
        evaluate(settings, weights, device).retrieval.image_embeddings
        for settings, device in ((config, "cpu"), (config, "cuda"), (rough, "cuda"))
    )
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-5)
    assert float((in_bf16 - on_cpu).abs().max()) > 1e-4


def test_evaluation_keeps_tf32_out_of_convolutions():
    """torch allows it there by default: 10 bits of mantissa in place of 23."""
    images, filters = torch.randn(8, 64, 32, 32, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    exact = torch.nn.functional.conv2d(images.cpu().double(), filters.cpu().double())
    with evaluating(TrainConfig().eval_precision, torch.device("cuda")):
        found = torch.nn.functional.conv2d(images, filters)
    assert torch.backends.cudnn.allow_tf32
    assert float((found.cpu() - exact).abs().max()) < 1e-3


def test_submissions_and_features_of_a_composed_run_are_fp32_on_a_gpu(composed):
    config = build_config(recipe_config("scenes-cir-finetune"), {"data.path": str(composed)})
    found = [evaluate(config, None, device).retrieval.query_embeddings for device in ("cpu", "cuda")]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    row = (composed / "val").glob("*.parquet")
    images = pq.read_table(next(path for path in sorted(row) if path.name.startswith("part")))["image"].to_pylist()
    combiner = make_task(build_config(recipe_config("scenes-cir-combiner"), {"data.path": str(composed)}))
    vectors = []
    for device in ("cpu", "cuda"):
        encoder, _ = combiner.features.load(device)
        vectors.append(encoder.encode_images(torch.stack([encoder.prepare(open_image(image)) for image in images])))
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-4, atol=1e-5)


@pytest.mark.ray
def test_two_trials_of_a_search_share_a_gpu(config, tmp_path):
    from harma_ray.on_ray.cluster import ray_cluster
    from harma_ray.resources import plan_trials
    from harma_ray.tune.folder import read_search
    from harma_ray.tune.search import finish_best, prepare_trials, run_search
    from harma_ray.tune.space.definition import Limits, SearchDefinition
    from harma_ray.tune.space.parameters import Range

    shared = build_config(config, {"scaling.gpus_per_worker": 0.5, "scaling.cpus_per_worker": 0.5})
    rate = Range(name="optim.learning_rate", kind="float", low=1e-4, high=1e-2, log=True)
    space = SearchDefinition(config=shared, parameters=(rate,), limits=Limits(trials=4), concurrent=2)
    with ray_cluster() as cluster:
        plan = plan_trials(shared, cluster, 2)
        assert plan.workers.gpus_per_worker == 0.5
        setting = prepare_trials(space, plan)
        results = run_search(tmp_path, space, plan, setting, lambda event: None)
        assert {trial.state for trial in results.trials} <= {"complete", "stopped"}
        steps = [record for record in read_records(results.trials[0].folder) if record["kind"] == "step"]
        assert all(record["gpu_memory_mb"] > 0 for record in steps)
        best = space.settings(dict(results.trials[results.best].params))
        finish_best(results, setting, best)
        assert set(read_search(tmp_path, space).final) == {"val", "test"}
