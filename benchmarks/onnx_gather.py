"""A codebook in ONNX exactly, by `Gather`: what it costs in ONNX Runtime beside int8 codes.

    python -m benchmarks.onnx_gather [--scheme cb4] [--rows 8192] [--columns 2048] [-r 5]
        [-o benchmarks/results/onnx-gather.json]

One matrix of random numbers (by default the size of LFM2-1.2B's w1), as indices that a graph looks
up in its codebook, against the same numbers as int8 codes in MatMulNBits, which is what an export
writes. ONNX Runtime turns the first into a float matrix when it loads it, unless it is told not to
fold constants; then it looks up every weight in every run. First each form's weight is compared
with `QuantizedTensor.dequantize()`, bit for bit. Then every form is loaded and run in a process of
its own, one thread, in rounds of which every other goes backwards.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks import machine
from benchmarks.measure import run
from benchmarks.report import table
from edgekit.exporters.onnx.contrib import INT8_ACTIVATIONS
from edgekit.exporters.onnx.packing import pack_matrix
from edgekit.quantize.by_scheme import quantize_weight
from edgekit.quantize.packing import pack
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.tensor import QuantizedTensor, as_rows

WEIGHT = "weight"
NOTHING_FOLDED = {"optimization.disable_specified_optimizers": "ConstantFolding"}
FORMS = {
    "int8 codes, MatMulNBits": ("int8", {}),
    "Gather": ("gather", {}),
    "Gather, not folded": ("gather", NOTHING_FOLDED),
}
"""By name the model and how its session is configured."""
BATCHES = (1, 64)
"""Tokens of a run: decode and a short prefill."""
QUIET_DEADLINE_SECONDS = 120


def gather_model(tensor: QuantizedTensor) -> onnx.ModelProto:
    """Return `y = x W^T` and the weight W, which is looked up in its codebooks in plain ONNX.

    Indices are stored with 4 bits (ONNX has no type of 3), in the order of the rows; where runs of
    rows have their own codebooks, these lie in one table and a row adds its offset.
    """
    assert tensor.codebook is not None
    rows, columns = tensor.shape
    books = as_rows(tensor.codebook)
    offsets = torch.arange(rows) // (rows // len(books)) * books.shape[1]
    groups = tensor.scales.reshape(rows, -1).shape[1]
    indices = pack(tensor.codes.reshape(1, -1), 4).numpy()
    arrays = {
        "codebook": books.flatten().numpy(),
        "offsets": offsets[:, None].int().numpy(),
        "scales": tensor.scales.reshape(rows, groups, 1).numpy(),
        "blocks": np.array([rows, groups, columns // groups]),
        "shape": np.array([rows, columns]),
    }
    nodes = [
        helper.make_node("Cast", ["indices"], ["wide"], to=TensorProto.INT32),
        helper.make_node("Add", ["wide", "offsets"], ["places"]),
        helper.make_node("Gather", ["codebook", "places"], ["entries"]),
        helper.make_node("Reshape", ["entries", "blocks"], ["blocked"]),
        helper.make_node("Mul", ["blocked", "scales"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "shape"], [WEIGHT]),
        helper.make_node("Transpose", [WEIGHT], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["y"]),
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    constants.append(
        helper.make_tensor("indices", TensorProto.UINT4, [rows, columns], indices.tobytes(), True)
    )
    return _model(nodes, constants, rows, columns)


def int8_model(tensor: QuantizedTensor) -> onnx.ModelProto:
    """Return `y = x W^T` with the codebook's entries as int8 codes, as an export writes it."""
    packed = pack_matrix(tensor.as_int8())
    rows, columns = packed.shape
    blocks = columns // packed.block_size
    constants = [
        numpy_helper.from_array(packed.numbers.view(rows, blocks, -1).numpy(), "numbers"),
        numpy_helper.from_array(packed.scales.numpy(), "scales"),
    ]
    product = helper.make_node(
        "MatMulNBits",
        ["x", "numbers", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=packed.bits,
        block_size=packed.block_size,
        accuracy_level=INT8_ACTIVATIONS,
    )
    return _model([product], constants, rows, columns)


def _model(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], rows: int, columns: int
) -> onnx.ModelProto:
    def vector(name: str, width: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])

    graph = helper.make_graph(
        nodes, "matrix", [vector("x", columns)], [vector("y", rows)], constants
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return model


def looked_up(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the part of a `gather_model` that gives the weight, without inputs."""
    shape = next(each for each in model.graph.initializer if each.name == "shape")
    graph = helper.make_graph(
        [node for node in model.graph.node if node.output[0] not in ("turned", "y")],
        "weight",
        [],
        [
            helper.make_tensor_value_info(
                WEIGHT, TensorProto.FLOAT, numpy_helper.to_array(shape).tolist()
            )
        ],
        model.graph.initializer,
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def session(
    model: bytes | str, config: dict[str, str], threads: int = 1
) -> onnxruntime.InferenceSession:
    """Open a model in ONNX Runtime's CPU provider."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def one(path: Path, form: str, columns: int) -> dict[str, Any]:
    """Load a form in this process, run it and return a sample."""
    before, start = resident(), time.perf_counter_ns()
    opened = session(str(path), FORMS[form][1])
    sample: dict[str, Any] = {"load_ns": time.perf_counter_ns() - start}
    draw = np.random.default_rng(0)
    for tokens in BATCHES:
        x = draw.standard_normal((tokens, columns), dtype=np.float32)
        opened.run(["y"], {"x": x})
        times: list[int] = []
        while len(times) < 5 or sum(times) < 1_000_000_000:
            start = time.perf_counter_ns()
            opened.run(["y"], {"x": x})
            times.append(time.perf_counter_ns() - start)
        sample[f"run_{tokens}_ns"] = median(times)
    sample["resident_bytes"] = resident() - before
    return sample


def check_exact(tensor: QuantizedTensor, models: dict[str, onnx.ModelProto]) -> None:
    """Raise SystemExit where a weight that ONNX Runtime looks up is not the tensor's."""
    wanted = tensor.dequantize().numpy()
    part = looked_up(models["gather"]).SerializeToString()
    for config in ({}, NOTHING_FOLDED):
        (found,) = session(part, config).run([WEIGHT], {})
        if not np.array_equal(found, wanted):
            raise SystemExit(f"the weight differs from the tensor's with {config}")


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the record of all rounds."""
    shape = arguments.rows, arguments.columns
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    tensor = quantize_weight(parse_scheme(arguments.scheme), weight)
    models = {"gather": gather_model(tensor), "int8": int8_model(tensor)}
    check_exact(tensor, models)
    record: dict[str, Any] = {
        "machine": machine.facts(),
        "scheme": arguments.scheme,
        "shape": shape,
        "busy_share_before": [],
        "file_bytes": {},
        "samples": {form: [] for form in FORMS},
    }
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: Path(scratch) / f"{name}.onnx" for name in models}
        for name, model in models.items():
            paths[name].write_bytes(model.SerializeToString())
        record["file_bytes"] = {
            form: paths[name].stat().st_size for form, (name, _) in FORMS.items()
        }
        for number in range(arguments.repetitions):
            record["busy_share_before"].append(machine.wait_until_quiet(QUIET_DEADLINE_SECONDS))
            for form in list(FORMS) if number % 2 == 0 else list(FORMS)[::-1]:
                command = [
                    *(sys.executable, "-m", "benchmarks.onnx_gather", "--one", form),
                    *("--model", str(paths[FORMS[form][0]]), "--columns", str(shape[1])),
                ]
                record["samples"][form].append(json.loads(run(command).stdout))
    return record


def markdown(record: dict[str, Any]) -> str:
    """Return the record as a table of medians."""

    def middle(form: str, what: str) -> float:
        return float(median(sample[what] for sample in record["samples"][form]))

    cells = []
    base = next(iter(FORMS))
    for form in FORMS:
        times = [middle(form, f"run_{tokens}_ns") for tokens in BATCHES]
        ratios = [
            median(
                mine[f"run_{tokens}_ns"] / theirs[f"run_{tokens}_ns"]
                for mine, theirs in zip(
                    record["samples"][form], record["samples"][base], strict=True
                )
            )
            for tokens in BATCHES
        ]
        cells.append(
            [
                form,
                f"{record['file_bytes'][form] / 1e6:.1f}",
                f"{middle(form, 'resident_bytes') / 1e6:.0f}",
                *(
                    f"{value / 1e6:.2f} ({ratio:.1f}x)"
                    for value, ratio in zip(times, ratios, strict=True)
                ),
            ]
        )
    heads = [f"ms, {tokens} token{'s' * (tokens > 1)}" for tokens in BATCHES]
    return table(("", "file MB", "memory MB", *heads), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scheme", default="cb4")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--one", choices=FORMS, help="this form of --model, one sample")
    parser.add_argument("--model", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(one(arguments.model, arguments.one, arguments.columns)))
        return
    record = measured(arguments)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    print(markdown(record))


if __name__ == "__main__":
    main()
