"""How workers are connected: as by Ray Train 2.60's own settings for torch, by a controller that does without torch."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train.torch import TorchConfig

from harma_ray.on_ray import process_group
from harma_ray.on_ray.process_group import ProcessGroup


def test_what_the_controller_reads_does_without_torch():
    code = """
import os, pickle, sys
from harma_ray.on_ray.process_group import ProcessGroup
from harma_ray.on_ray.trainer import Trainer
group = pickle.loads(pickle.dumps(ProcessGroup("gloo", 600)))
assert group.backend_cls() and group.framework and group.to_dict()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


class Group:
    """Workers that only note what they are told."""

    def __init__(self):
        self.told = []

    def __len__(self):
        return 2

    def execute_single(self, rank, function, *args, **kwargs):
        return ("here", 1234)

    def execute(self, function, *args, **kwargs):
        self.told.append((function.__name__, args, kwargs))

    def execute_async(self, function, *args, **kwargs):
        self.told.append((function.__name__, args, kwargs))
        return []

    def execute_single_async(self, rank, function, *args, **kwargs):
        self.told.append((rank, function, args, kwargs))


def told_by(config: Any):
    """Returns what the workers are told at the start and at the end."""
    group: Any = Group()
    config.backend_cls().on_start(group, config)
    config.backend_cls().on_shutdown(group, config)
    return group.told


def test_workers_are_told_what_rays_own_backend_tells_them(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda references, timeout=None: None)
    theirs, ours = (told_by(config) for config in (TorchConfig("gloo", timeout_s=9), ProcessGroup("gloo", 9)))
    assert [kwargs for name, _, kwargs in theirs[:2]] == [
        {"addr": "here", "port": 1234},
        {},
    ]  # both variables, the rest
    assert ours[0] == ("update_env_vars", ({"MASTER_ADDR": "here", "MASTER_PORT": 1234},), {})
    calls = []
    module = SimpleNamespace(
        _set_torch_distributed_env_vars=lambda: calls.append("variables"),
        _setup_torch_process_group=lambda *args: calls.append(args),
    )
    monkeypatch.setitem(sys.modules, "ray.train.torch.config", module)
    names = ("backend", "world_rank", "world_size", "init_method", "timeout_s")
    for (rank, _, _, wanted), (own_rank, function, args, _) in zip(theirs[2:4], ours[1:3], strict=True):
        assert rank == own_rank
        function(*args)
        assert calls == ["variables", tuple(wanted[name] for name in names)]
        calls.clear()
    assert theirs[4][2] == {"destroy_process_group": True}
    assert ours[3] == ("_disconnect", (True,), {})
    monkeypatch.setattr(module, "_shutdown_torch", lambda **options: calls.append(options), raising=False)
    process_group._disconnect(True)
    assert calls == [theirs[4][2]]


def test_it_is_shown_placed_and_entered_as_rays_own():
    ours, theirs = ProcessGroup("nccl", 600), TorchConfig("nccl", timeout_s=600)
    assert ours.framework == theirs.framework
    assert ours.to_dict() == {"backend": "nccl", "timeout_s": 600}
    assert ours.to_dict().items() <= theirs.to_dict().items()
    assert ours.train_func_context is theirs.train_func_context
    assert ours.backend_cls.share_cuda_visible_devices is theirs.backend_cls.share_cuda_visible_devices is True


def test_workers_that_do_not_leave_are_told_of_and_left(monkeypatch, caplog):
    def late(references, timeout):
        raise GetTimeoutError

    monkeypatch.setattr(process_group.ray, "get", late)
    monkeypatch.setenv("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "7")
    config = ProcessGroup("gloo", 600)
    group: Any = Group()
    config.backend_cls().on_shutdown(group, config)
    assert "did not leave their process group within 7 s" in caplog.text
