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
assert not [name for name, module in sys.modules.items() if type(module).__module__ == "harma_ray.compiler"]
"""
DEFERRED = """
import os, traceback
defer_compiler()
import torch
for line in sys.stdin:
    if not (pid := os.fork()):
        try:
            exec(eval(line), globals())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
"""Reads code, a line each; runs each in a process of its own."""
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


@pytest.fixture(scope="module")
def run_deferred():
    """Runs code in a process that is forked from one in which torch was imported and its compiler was not."""
    command = [sys.executable, "-c", HEAD + DEFERRED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run_forked(code):
            print(repr(code), file=process.stdin, flush=True)
            assert process.stdout.readline() == "0\n"

        yield run_forked


@pytest.mark.parametrize("defer", [True, False])
def test_a_replicated_training_does_without_it_and_by_itself_torch_does_not(defer):
    found = "not is_there() and 'sympy' not in sys.modules and 'torch.distributed.fsdp' not in sys.modules"
    run(TRAIN.format(defer="defer_compiler()" if defer else "") + f"assert ({found}) is {defer}")


def test_what_compiles_has_it_whole(run_deferred):
    run_deferred(
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
        "from torch._dynamo import *; name = 'torch._dynamo'; found = sys.modules[name]; explain",
    ],
)
def test_it_is_imported_once_however_it_is_asked_for(run_deferred, ask):
    run_deferred(
        f"{ask}\n"
        "assert found is sys.modules[name]\n"
        "assert found.__spec__.origin == found.__file__\n"
        "import torch._dynamo.eval_frame\n"
        "assert torch._dynamo.eval_frame is sys.modules['torch._dynamo.eval_frame']\n" + NOTHING_LEFT
    )


def test_who_asks_for_it_first_of_all_has_torch_imported_with_it():
    run("defer_compiler()\nimport torch._dynamo\ntorch._dynamo.reset()\nimport torch\n" + NOTHING_LEFT)


def test_it_can_be_looked_for_without_being_imported(run_deferred):
    run_deferred(
        "import importlib.util, inspect\n"
        "assert importlib.util.find_spec('torch._dynamo').origin.endswith('_dynamo/__init__.py')\n"
        "assert importlib.util.find_spec('json').name == 'json'\n"
        "assert importlib.util.find_spec('torch._dynamo.utils').origin.endswith('_dynamo/utils.py')\n"
        "inspect.getmodule(compile('', inspect.__file__, 'exec'))\n"
        "assert not is_there()\n"
    )


TOLD = {
    "@torch.compiler.disable(reason='it counts')\ndef told(x): return x + torch.compiler.is_compiling()": 1,
    "@torch.compiler.disable(recursive=False)\ndef told(x): return inner(x.sin())": 2,
    "from torch._dynamo import graph_break\ndef told(x): y = x.sin(); graph_break(); return y.cos()": 3,
    "import torch._dynamo as d\ndef told(x): y = x.sin(); d.graph_break(); return y.cos()": 3,
}
"""What the compiler is told, and how many graphs it makes of it."""


@pytest.mark.parametrize("defer", [True, False])
def test_what_it_is_told_before_it_is_there_it_heeds_as_if_it_had_been(defer):
    run(
        f"""
from contextlib import nullcontext
def inner(x):
    assert torch.compiler.is_compiling() or not is_there()
    return x.cos()
def define(source):
    names = {{"torch": torch, "inner": inner}}
    exec(source, names)
    return names["told"]
with deferred_compiler() if {defer} else nullcontext():
    import torch
    functions = [define(source) for source in {[*TOLD]!r}]
if {defer}:
    assert "torch._dynamo" not in sys.modules
    for told in functions:
        told(torch.ones(1))
    assert not is_there()
def count(graph, inputs):
    seen.append(graph)
    return graph
for number, (told, graphs) in enumerate(zip(functions, {[*TOLD.values()]!r}, strict=True)):
    seen = []
    @torch.compile(backend=count)
    def whole(x):
        return told(2 * x)
    value = whole(torch.ones(1))
    assert len(seen) == graphs, (number, len(seen))
    assert number or value == 2, value
    torch._dynamo.reset()
"""
        + NOTHING_LEFT
    )


def test_what_torch_keeps_of_the_stand_in_goes_when_the_compiler_comes(run_deferred):
    run_deferred(
        "optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])\n"
        "optimizer.zero_grad()\n"
        "method = torch.optim.Optimizer.zero_grad.__wrapped__\n"
        "kept = vars(method)['__dynamo_disable']\n"
        "assert kept.__code__.co_filename.endswith('compiler.py')\n"
        "torch._dynamo.reset()\n"
        "optimizer.zero_grad()\n"
        "assert vars(method)['__dynamo_disable'] is not kept\n" + NOTHING_LEFT
    )


def test_a_lasting_deferral_outlives_a_block_that_it_happens_in():
    run("with deferred_compiler():\n    defer_compiler()\nimport torch._dynamo\nassert not is_there()\n")


@pytest.mark.parametrize("ours", [True, False])
def test_torchvision_asks_the_real_one_and_may_be_compiled(ours):
    run(
        ("import harma_ray.data.padding\nassert 'torch._dynamo' not in sys.modules\n" if ours else "")
        + "import torch\n"
        "from torchvision.ops import roi_align\n"
        "from importlib import import_module\n"
        "supported = import_module('torchvision.ops.roi_align').is_compile_supported\n"
        "assert supported('cpu') is True\n"
        "from torch._dynamo import utils\n"
        f"assert (supported is utils.is_compile_supported) is not {ours}\n"
        "@torch.compile(backend='eager', fullgraph=True)\n"
        "def ask(x): return x + supported('cpu')\n"
        "assert ask(torch.ones(1)) == 2\n" + NOTHING_LEFT
    )


def test_a_process_that_has_it_keeps_it():
    run("import torch._dynamo as real\ndefer_compiler()\nassert sys.modules['torch._dynamo'] is real\n" + NOTHING_LEFT)


def test_its_default_for_replicas_is_what_is_said_without_it(run_deferred):
    run_deferred(
        "said = torch._dynamo.utils.get_optimize_ddp_mode()\n"
        "assert not is_there()\n"
        "torch._dynamo.reset()\n"
        "assert torch._dynamo.utils.get_optimize_ddp_mode() == said"
    )
