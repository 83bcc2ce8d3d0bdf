"""The engine protocol, on torch and on ExecuTorch, over one small stateful module."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, export

from edgekit.errors import EdgekitError
from edgekit.runtime.engines.engine import OneSequenceEngine, load_engine
from edgekit.runtime.engines.executorch.binding import check_program_file
from edgekit.runtime.engines.executorch.decoder import ExecutorchEngine
from edgekit.runtime.engines.torch.decoder import TorchEngine

VOCAB, CONTEXT, CHUNK, PREFILL_CHUNK = 64, 32, 8, 3
Metadata = dict[str, int | list[int]]
METADATA: Metadata = {
    "get_max_context_len": CONTEXT,
    "get_vocab_size": VOCAB,
    "get_eos_ids": [7],
    "get_prefill_chunk": PREFILL_CHUNK,
}


class Remembering(nn.Module):
    """Logits that depend on every token so far and on its place, kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.register_buffer("seen", torch.zeros(CONTEXT, 16))
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        seen = cast(Tensor, self.seen)
        places = input_pos + torch.arange(tokens.shape[1])
        seen.index_copy_(0, places, self.embedding(tokens)[0])
        weight = torch.arange(1, CONTEXT + 1) * (torch.arange(CONTEXT) <= places[-1])
        return cast(Tensor, self.head((seen * weight[:, None] / CONTEXT).sum(0, keepdim=True)))


class Accumulating(nn.Module):
    """Keeps its state whatever the position, as a short convolution in a foreign program does."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.head = nn.Linear(16, VOCAB)
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.register_buffer("total", torch.zeros(1, 16))
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        total = cast(Tensor, self.total)
        total.add_(self.embedding(tokens).sum(1))
        return cast(Tensor, self.head(total) + 0 * input_pos)


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def write_program(
    path: Path,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    metadata: Metadata | None = None,
    chunk: int = 0,
) -> Path:
    shapes = ({1: Dim("n", min=1, max=chunk)}, None) if chunk else None
    with torch.no_grad():
        program = to_edge_transform_and_lower(
            export(module.eval(), inputs, dynamic_shapes=shapes, strict=False),
            partitioner=[XnnpackPartitioner()],
            constant_methods=metadata,
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        ).to_executorch(
            ExecutorchBackendConfig(
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )
    path.write_bytes(program.buffer)
    return path


def model_inputs(count: int) -> tuple[Tensor, Tensor]:
    return torch.zeros((1, count), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.pte"
    return write_program(path, Remembering(), model_inputs(2), METADATA, CHUNK)


@pytest.fixture(params=["torch", "executorch"])
def engine(request: pytest.FixtureRequest, program: Path) -> Iterator[OneSequenceEngine]:
    opened: OneSequenceEngine
    if request.param == "torch":
        opened = TorchEngine(Remembering(), CONTEXT, VOCAB, threads=1)
    else:
        opened = ExecutorchEngine(program, threads=1)
    with opened:
        yield opened


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(VOCAB, size=count)]


def expected(tokens: list[int]) -> Tensor:
    start = torch.zeros(1, dtype=torch.int64)
    return cast(Tensor, Remembering()(torch.tensor([tokens]), start))[0]


@pytest.mark.parametrize("count", [1, CHUNK, CHUNK + 1, CONTEXT])
def test_prefill_takes_any_length_up_to_the_context(engine: OneSequenceEngine, count: int) -> None:
    tokens = some_tokens(count)
    logits = engine.prefill(tokens)
    assert logits.dtype == np.float32
    assert logits.shape == (VOCAB,)
    np.testing.assert_allclose(logits, expected(tokens), rtol=1e-4, atol=1e-4)
    assert engine.position == count


def test_a_prompt_runs_in_the_pieces_that_the_program_states(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, passes = some_tokens(CHUNK + 1), []
    with ExecutorchEngine(program, threads=1) as engine:
        forward = engine._forward

        def counted(part: NDArray[np.int64], position: int) -> NDArray[np.float32]:
            passes.append(len(part))
            return forward(part, position)

        monkeypatch.setattr(engine, "_forward", counted)
        for chunk in (None, 4, 1 << 20):
            engine.reset()
            np.testing.assert_allclose(
                engine.prefill(tokens, chunk), expected(tokens), rtol=1e-4, atol=1e-4
            )
    assert passes == [3, 3, 3, 4, 4, 1, 8, 1]


@pytest.mark.parametrize("chunk", [0, CHUNK + 1, [1, 2]])
def test_impossible_pieces_are_refused(tmp_path: Path, chunk: int | list[int]) -> None:
    metadata = METADATA | {"get_prefill_chunk": chunk}
    path = write_program(tmp_path / "m.pte", Remembering(), model_inputs(2), metadata, CHUNK)
    with pytest.raises(EdgekitError, match=rf"get_prefill_chunk must be 1 to {CHUNK}, not "):
        ExecutorchEngine(path, threads=1)


def test_chunks_and_single_tokens_equal_one_prefill(engine: OneSequenceEngine) -> None:
    tokens = some_tokens(20)
    engine.prefill(tokens[:3])
    engine.prefill(tokens[3:14])
    for token in tokens[14:]:
        logits = engine.decode(token)
    np.testing.assert_allclose(logits, expected(tokens), rtol=1e-4, atol=1e-4)


def test_reset_forgets(engine: OneSequenceEngine) -> None:
    engine.prefill(some_tokens(30, seed=1))
    engine.reset()
    assert engine.position == 0
    tokens = some_tokens(5)
    np.testing.assert_allclose(engine.prefill(tokens), expected(tokens), rtol=1e-4, atol=1e-4)


def test_reset_forgets_what_a_foreign_program_keeps(tmp_path: Path) -> None:
    path = write_program(tmp_path / "m.pte", Accumulating(), model_inputs(2), None, CHUNK)
    tokens = some_tokens(3)
    exact = Accumulating()(torch.tensor([tokens]), torch.zeros(1, dtype=torch.int64))[0]
    with ExecutorchEngine(path, threads=1) as engine:
        for _ in range(3):
            np.testing.assert_allclose(engine.prefill(tokens), exact, rtol=1e-4, atol=1e-4)
            engine.reset()
        engine.prefill(tokens)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(EdgekitError, match=r"m\.pte: "):
            engine.reset()


def test_a_program_of_our_own_is_not_loaded_again(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExecutorchEngine(program, threads=1) as engine:
        engine.prefill(some_tokens(3))
        monkeypatch.setattr("edgekit.runtime.engines.executorch.decoder.load_program", None)
        engine.reset()
        engine.prefill(some_tokens(3))


def test_logits_stay_what_they_were(engine: OneSequenceEngine) -> None:
    first = engine.prefill([1, 2, 3])
    copy = first.copy()
    second = engine.decode(4)
    engine.close()
    assert (first == copy).all()
    assert not np.array_equal(first, second)


def test_what_does_not_fit_is_refused_before_any_work(engine: OneSequenceEngine) -> None:
    with pytest.raises(EdgekitError, match="^prompt of 33 tokens does not fit the context of 32$"):
        engine.prefill(some_tokens(33))
    assert engine.position == 0
    engine.prefill(some_tokens(32))
    with pytest.raises(EdgekitError, match="^1 token after the 32 processed do not fit"):
        engine.decode(1)
    assert engine.position == 32


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "holds no token"),
        ([1, VOCAB], f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ([-1, 3], "token id -1 is outside"),
        ([1.5], "flat sequence of integers"),
        ([[1]], "flat sequence of integers"),
    ],
)
def test_bad_tokens_are_refused(engine: OneSequenceEngine, tokens: list[int], words: str) -> None:
    with pytest.raises(EdgekitError, match=words):
        engine.prefill(tokens)


def test_a_closed_engine_says_so(engine: OneSequenceEngine) -> None:
    engine.close()
    with pytest.raises(EdgekitError, match=f"the {engine.name} engine is closed"):
        engine.prefill([1])


def test_engines_state_name_and_version(engine: OneSequenceEngine) -> None:
    assert engine.version.startswith({"torch": "2.", "executorch": "1."}[engine.name])


def test_load_engine_knows_its_engines(program: Path) -> None:
    with pytest.raises(EdgekitError, match="unknown engine 'tflite': allowed are executorch, "):
        load_engine("tflite", program)
    with pytest.raises(EdgekitError, match="threads must be at least 1, not 0"):
        load_engine("executorch", program, threads=0)
    engine = load_engine("executorch", program, threads=1)
    assert (engine.name, engine.context, engine.vocab_size) == ("executorch", CONTEXT, VOCAB)
    engine.close()


def test_metadata_is_read(program: Path) -> None:
    with ExecutorchEngine(program, threads=1) as engine:
        assert engine.metadata == METADATA


def test_a_program_without_metadata_runs_by_its_shapes(tmp_path: Path) -> None:
    path = write_program(tmp_path / "bare.pte", Remembering(), model_inputs(2), chunk=CHUNK)
    with ExecutorchEngine(path, threads=1) as engine:
        assert (engine.context, engine.vocab_size, engine.metadata) == (CHUNK, VOCAB, {})
        tokens = some_tokens(CHUNK)
        np.testing.assert_allclose(engine.prefill(tokens), expected(tokens), rtol=1e-4, atol=1e-4)


def test_a_program_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    path = write_program(tmp_path / "sum.pte", Sum(), (torch.ones(2, 2), torch.ones(2, 2)))
    with pytest.raises(EdgekitError, match=r"forward must take tokens int64 \[1, n\]"):
        ExecutorchEngine(path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_is_mapped(program: Path) -> None:
    with ExecutorchEngine(program, threads=1):
        assert str(program) in Path("/proc/self/maps").read_text()
    assert str(program) not in Path("/proc/self/maps").read_text()


def test_threads_cannot_change_under_an_open_engine(program: Path) -> None:
    with (
        ExecutorchEngine(program, threads=2),
        pytest.raises(EdgekitError, match="open engine of this process uses 2 threads; close it"),
    ):
        ExecutorchEngine(program, threads=1)
    ExecutorchEngine(program, threads=1).close()


def test_cpp_writes_nothing_to_stderr(program: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ExecutorchEngine(program, threads=2) as engine:
        engine.prefill([1, 2, 3])
    ExecutorchEngine(program, threads=1).close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kept", [0, 3, 20, 39, 40, 1000, -1])
def test_a_truncated_program_is_refused(program: Path, tmp_path: Path, kept: int) -> None:
    path = tmp_path / "cut.pte"
    path.write_bytes(program.read_bytes()[:kept])
    with pytest.raises(EdgekitError, match="cut.pte: is (truncated|damaged|not an ExecuTorch)"):
        ExecutorchEngine(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"GGUF\x03\0\0\0" + bytes(64), "is not an ExecuTorch program"),
        (b"<\0\0\0ET99" + bytes(64), "has the ExecuTorch format 'ET99'"),
        (b"<\0\0\0ET12" + bytes(64), "is damaged"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    with pytest.raises(EdgekitError, match=words):
        check_program_file(path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="none.pte: cannot be read: No such file"):
        ExecutorchEngine(tmp_path / "none.pte")


def test_a_damaged_program_is_one_line(
    program: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    content = bytearray(program.read_bytes())
    content[40:2000] = bytes(1960)  # behind an intact header
    path = tmp_path / "damaged.pte"
    path.write_bytes(content)
    with pytest.raises(EdgekitError, match="executorch cannot load .*damaged.pte: ") as caught:
        ExecutorchEngine(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_the_torch_engine_opens_a_model_by_name() -> None:
    engine = load_engine("torch", Path("lfm2-tiny"), threads=1)
    tokens = [1, 5, 9, 13]
    whole = engine.prefill(tokens)
    assert whole.shape == (engine.vocab_size,)
    engine.reset()
    engine.prefill(tokens[:2])
    engine.decode(tokens[2])
    np.testing.assert_allclose(engine.decode(tokens[3]), whole, atol=1e-4)
    engine.close()


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(EdgekitError, match="context must be 1 to [0-9]+ for .*, not 10000000$"):
        TorchEngine.from_model("lfm2-tiny", context=10_000_000)


def test_running_a_file_imports_no_exporter() -> None:
    code = (
        "import sys, edgekit.runtime.engines.executorch.decoder\n"
        "heavy = {'executorch.exir', 'torchao', 'transformers'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
