"""What ONNX Runtime makes of a model: the operators that it runs after its own rewriting.

Found by running one token with the profiler on: writing the optimised graph to a file would write
all the weights, too.
"""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from edgekit.common.last_words import engine_on, half_written
from edgekit.errors import EdgekitError, VerificationError, one_line
from edgekit.formats.onnx.file import OnnxFile
from edgekit.formats.onnx.genai_config import GenaiConfig, is_genai_folder

_FATAL = 4
_INT8_ACTIVATIONS = 4
_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


def operators_run(path: Path) -> dict[str, int]:
    """Return the operators of one run with the number of their calls, most frequent first.

    EdgekitError as `kernels_run`.
    """
    return dict(Counter(name for name, _ in kernels_run(path)).most_common())


def kernels_run(path: Path) -> list[tuple[str, bool]]:
    """Return the operator of each call of one run, and whether its results are float.

    EdgekitError where ONNX Runtime refuses the model or does not run it with one token.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        half_written(Path(folder)),
        engine_on("onnx", path),
    ):
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "run"))
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            session.run(None, _one_token(session, _head_size(path)))
            profile = Path(session.end_profiling())
        except Exception as error:  # the exceptions of onnxruntime share no other base
            raise EdgekitError(f"{path}: onnxruntime does not run it: {one_line(error)}") from error
        try:
            events = json.loads(profile.read_bytes())
        except (OSError, ValueError) as error:  # onnxruntime says nothing of a full disk
            raise EdgekitError(
                f"{tempfile.gettempdir()}: onnxruntime could not write the profile of a run there: "
                "free some space or set TMPDIR to another folder"
            ) from error
    kernels = (event["args"] for event in events if event["name"].endswith("_kernel_time"))
    return [(kernel["op_name"], "float" in _types(kernel)) for kernel in kernels]


def _types(kernel: dict[str, Any]) -> set[str]:
    """Return the types of a kernel's results: the profile has `[{"uint8": [1, 8]}]`."""
    return {name for result in kernel["output_type_shape"] for name in result}


def check_fast(path: Path) -> None:
    """Refuse what ONNX Runtime computes slowly, by tens of times; VerificationError names it.

    A DequantizeLinear that it has not fused makes the whole float matrix for each token, and so
    does MatMulNBits with float activations at 8 bits.
    """
    slow = [
        node.name
        for node in OnnxFile.open(path).graph.all_nodes()
        if node.op_type == "MatMulNBits"
        and node.attributes.get("accuracy_level") != _INT8_ACTIVATIONS
    ]
    if slow:
        raise VerificationError(
            f"{path.name}: {len(slow)} MatMulNBits do not round their activations to int8, "
            f"such as {slow[0]}"
        )
    unfused = operators_run(path).get("DequantizeLinear", 0)
    if unfused:
        raise VerificationError(
            f"{path.name}: ONNX Runtime runs {unfused} DequantizeLinear that it has not fused"
        )


def _one_token(
    session: ort.InferenceSession, head_size: int | None
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
    """Return inputs for one token of a new sequence: caches are empty, other symbols are 1."""
    found = {}
    for value in session.get_inputs():
        sizes = [size if isinstance(size, int) else None for size in value.shape]
        if value.name.startswith("past_key_values") and len(sizes) == 4:
            sizes[2] = 0
            sizes[3] = sizes[3] or head_size
        found[value.name] = np.ones([1 if s is None else s for s in sizes], _TYPES[value.type])
    return found


def _head_size(path: Path) -> int | None:
    return GenaiConfig.open(path.parent).head_size if is_genai_folder(path.parent) else None
