"""ONNX graphs of a model's towers, held against the model."""

import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harma_ray.errors import UserError
from harma_ray.exports.request import require_packages
from harma_ray.models.towers import Tower

FACTS_NAME = "onnx.json"
TOLERANCE = 1e-4
"""Largest difference to the model: of unit vectors, and of features in parts of their largest number."""
_TRACED_ROWS = 2


def write_graphs(towers: Sequence[Tower], facts: Mapping[str, Any], folder: Path) -> str:
    """Writes ``NAME.onnx`` for each tower, fp32, for batches of any size, and what one must know to use them as JSON.

    Args:
        towers: The towers.
        facts: What is true of all of them.
        folder: Is made.

    Returns:
        How far the graphs are from the model, in words; a graph is checked if onnxruntime is installed.

    Raises:
        UserError: If a package is missing, or a graph computes something else than the model.
    """
    require_packages()
    folder.mkdir()
    checked = importlib.util.find_spec("onnxruntime") is not None
    written, differences = {}, {}
    for tower in towers:
        opset = _write_graph(tower, folder / f"{tower.name}.onnx")
        if checked:
            differences[tower.name] = _check_graph(tower, folder / f"{tower.name}.onnx")
        written[tower.name] = {
            "file": f"{tower.name}.onnx",
            "inputs": {name: _describe(tensor) for name, tensor in tower.inputs.items()},
            "outputs": list(tower.outputs),
            **tower.facts,
        }
    told = {**facts, "opset": opset, "precision": "fp32", "largest_differences": differences, "tolerance": TOLERANCE}
    (folder / FACTS_NAME).write_text(json.dumps({**told, "towers": written}, indent=1))
    if not checked:
        return 'not checked against the model: onnxruntime is not installed (pip install "harma-ray[onnx]")'
    found = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
    return f"largest difference to the model on a test batch: {found} (at most {TOLERANCE:g})"


def _write_graph(tower: Tower, path: Path) -> int:
    """Writes a tower's graph without what tells of this machine; returns its opset."""
    rows = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*The axis name")  # several inputs have it
        program: Any = torch.onnx.export(
            tower.module,
            tuple(tensor[:_TRACED_ROWS] for tensor in tower.inputs.values()),
            input_names=list(tower.inputs),
            output_names=list(tower.outputs),
            dynamic_shapes=tuple({0: rows} for _ in tower.inputs),
            dynamo=True,
            verbose=False,
        )
    graphs = [program.model.graph, *(function.graph for function in program.model.functions.values())]
    for part in (node for graph in graphs for node in (graph, *graph.all_nodes())):
        part.metadata_props.clear()  # traces, with the paths of this machine's files
    program.save(path)
    return program.model.opset_imports[""]


def _check_graph(tower: Tower, path: Path) -> float:
    """Returns the largest difference between a graph and its tower, for several numbers of rows."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for inputs in _batches(tower):
        with torch.no_grad():
            expected = tower.module(*inputs.values())
        expected = (expected,) if isinstance(expected, Tensor) else expected
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for array, tensor in zip(found, expected, strict=True):
            difference = np.abs(np.asarray(array) - tensor.numpy()).max()
            largest = max(largest, float(difference / max(1.0, float(tensor.abs().max()))))
    if not largest <= TOLERANCE:
        raise UserError(
            f"{path.name} computes something else than the model: numbers differ by up to {largest:.1e}, more than "
            f"{TOLERANCE:g}; nothing was written"
        )
    return largest


def _batches(tower: Tower) -> Iterator[dict[str, Tensor]]:
    """Yields a tower's examples in batches of other sizes than the traced one's."""
    for count in (_TRACED_ROWS + 1, 1):
        yield {name: tensor[:count] for name, tensor in tower.inputs.items()}


def _describe(tensor: Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype}[{', '.join(['batch', *map(str, tensor.shape[1:])])}]"
