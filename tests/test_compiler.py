"""torch's compiler stays out of processes that compile nothing, and is whole in those that do."""

import subprocess
import sys

import pytest

HEAD = """
import sys
from harma_ray.compiler import defer_compiler, deferred_compiler

def is_there():
    return hasattr(sys.modules.get("torch._dynamo"), "__file__")
"""
NOTHING_LEFT = """
assert is_there()
assert not [finder for finder in sys.meta_path if type(finder).__module__ == "harma_ray.compiler"]
assert not [name for name, module in sys.modules.items() if type(module).__module__ == "harma_ray.compiler"]
"""
TRAIN = """
import os, torch
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", WORLD_SIZE="1", RANK="0")
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
{defer}
import harma_ray.data.padding, harma_ray.models.clip, harma_ray.parallel
model = harma_ray.parallel.replicate(torch.nn.Linear(3, 3), "cpu")
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
optimizer.load_state_dict(optimizer.state_dict())
torch.distributed.destroy_process_group()
"""


def run(code):
    subprocess.run([sys.executable, "-c", HEAD + code], check=True, timeout=300)


@pytest.mark.parametrize("defer", [True, False])
def test_a_replicated_training_does_without_it_and_by_itself_torch_does_not(defer):
    found = "not is_there() and 'sympy' not in sys.modules and 'torch.distributed.fsdp' not in sys.modules"
    run(TRAIN.format(defer="defer_compiler()" if defer else "") + f"assert ({found}) is {defer}")


def test_what_compiles_has_it_whole():
    run(
        "defer_compiler()\n"
        "import torch\n"
        "def double(x): return 2 * x\n"
        "assert not is_there()\n"
        "assert torch.compile(double, backend='eager', fullgraph=True)(torch.ones(1)) == 2\n" + NOTHING_LEFT
    )


@pytest.mark.parametrize(
    "ask",
    [
        "import torch._dynamo.eval_frame as found; name = 'torch._dynamo.eval_frame'",
        "from torch._dynamo import config as found; name = 'torch._dynamo.config'",
        "from torch._dynamo.utils import counters; name = 'torch._dynamo'; found = __import__('torch')._dynamo",
        "import torch; found = torch._dynamo.exc; name = 'torch._dynamo.exc'",
        "import torch._dynamo; torch._dynamo.reset(); name = 'torch._dynamo'; found = torch._dynamo",
    ],
)
def test_it_is_imported_once_however_it_is_asked_for(ask):
    run(
        f"defer_compiler()\n{ask}\n"
        "import torch\n"
        "assert found is sys.modules[name]\n"
        "assert found.__spec__.origin == found.__file__\n"
        "import torch._dynamo.eval_frame\n"
        "assert torch._dynamo.eval_frame is sys.modules['torch._dynamo.eval_frame']\n" + NOTHING_LEFT
    )


def test_what_was_told_to_be_left_alone_is_left_alone_by_it():
    run(
        "with deferred_compiler():\n"
        "    import torch\n"
        "    @torch.compiler.disable(reason='it counts')\n"
        "    def alone(x):\n"
        "        return x + torch.compiler.is_compiling()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert alone(torch.ones(1)) == 1\n"
        "assert not is_there()\n"
        "assert torch.compile(lambda x: alone(2 * x), backend='eager')(torch.ones(1)) == 2\n" + NOTHING_LEFT
    )


def test_torchvision_asks_it_what_it_can():
    run(
        "import harma_ray.data.transforms, torch\n"
        "from torchvision.ops import roi_align\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "box = torch.tensor([[0., 0, 0, 4, 4]])\n"
        "assert roi_align(torch.ones(1, 1, 8, 8), box, (2, 2)).shape == (1, 1, 2, 2)\n"
    )


def test_a_process_that_has_it_keeps_it():
    run("import torch._dynamo as real\ndefer_compiler()\nassert sys.modules['torch._dynamo'] is real\n" + NOTHING_LEFT)


def test_its_default_for_replicas_is_what_is_said_without_it():
    code = (
        "defer_compiler()\nimport torch\nsaid = torch._dynamo.utils.get_optimize_ddp_mode()\nassert not is_there()\n"
        "torch._dynamo.reset()\nassert torch._dynamo.utils.get_optimize_ddp_mode() == said"
    )
    run(code)
