"""The gguf engine on a file that gguf-py wrote, against transformers' model of the same weights."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.foreign_gguf import FOLDER, write_foreign_gguf
from support.missing import uninstall
from transformers import Lfm2ForCausalLM

from edgekit.common.install import install_command
from edgekit.errors import EdgekitError
from edgekit.runtime.engines.engine import EngineMissing, Threads, import_engine, load_engine
from edgekit.runtime.engines.gguf import decoder as gguf_engine
from edgekit.runtime.engines.gguf.decoder import GgufEngine

VOCAB = 4096
LENGTH = 96


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def engine(path: Path) -> Iterator[GgufEngine]:
    with GgufEngine(path, threads=1, context=256) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected() -> NDArray[np.float32]:
    """transformers' logits for `some_tokens(LENGTH)`."""
    model = Lfm2ForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(torch.tensor([some_tokens(LENGTH)])).logits[0].numpy()
    return logits


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(8, VOCAB, size=count)]


def divergence(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Mean KL divergence in nats, from the reference."""
    p, q = (torch.from_numpy(rows).double().log_softmax(-1) for rows in (reference, logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_every_position_is_what_transformers_computes(
    engine: GgufEngine, expected: NDArray[np.float32]
) -> None:
    logits = engine.score(some_tokens(LENGTH), 0)
    assert logits.shape == expected.shape
    assert divergence(logits, expected) < 1e-5
    chosen = np.take_along_axis(expected, logits.argmax(-1)[:, None], -1)[:, 0]
    assert (expected.max(-1) - chosen).max() < 0.05, "the best token, or one as good"


@pytest.mark.parametrize("chunk", [None, 1, 7, 1 << 20])
def test_a_prompt_in_pieces_is_one_prompt(
    engine: GgufEngine, expected: NDArray[np.float32], chunk: int | None
) -> None:
    logits = engine.prefill(some_tokens(LENGTH), chunk)
    assert logits.dtype == np.float32
    assert logits.shape == (VOCAB,)
    assert engine.position == LENGTH
    assert divergence(logits[None], expected[-1:]) < 1e-5


def test_a_prompt_longer_than_one_pass(path: Path) -> None:
    tokens = some_tokens(700)
    with GgufEngine(path, threads=1, context=1024) as engine:
        whole = engine.prefill(tokens)
        rows = engine.score(tokens, 500)
        assert engine.longest_chunk == engine.default_chunk == 512
        assert len(rows) == 200
        np.testing.assert_allclose(rows[-1], whole, atol=1e-4)
        engine.reset()
        np.testing.assert_allclose(rows[0], engine.prefill(tokens[:501]), atol=1e-4)


@pytest.mark.parametrize("first", [0, 5, 11])
def test_scoring_at_once_is_scoring_token_by_token(engine: GgufEngine, first: int) -> None:
    tokens = some_tokens(12)
    rows = engine.score(tokens, first)
    assert engine.position == 12
    engine.reset()
    for place, token in enumerate(tokens):
        logits = engine.decode(token)
        if place >= first:
            assert divergence(rows[None, place - first], logits[None]) < 1e-5
    assert divergence(engine.score(tokens, first), rows) < 1e-12


def test_the_sequence_goes_on_after_a_score(engine: GgufEngine) -> None:
    tokens = some_tokens(20)
    whole = engine.prefill(tokens)
    engine.score(tokens[:19], 10)
    assert divergence(engine.decode(tokens[19])[None], whole[None]) < 1e-5


def test_reset_forgets(engine: GgufEngine) -> None:
    tokens = some_tokens(9)
    first = engine.prefill(tokens)
    engine.prefill(some_tokens(30, seed=1))
    engine.reset()
    assert engine.position == 0
    assert (engine.prefill(tokens) == first).all()


def test_logits_stay_what_they_were(engine: GgufEngine) -> None:
    first = engine.prefill([11, 12, 13])
    rows = engine.score([11, 12, 13], 0)
    copies = first.copy(), rows.copy()
    engine.decode(14)
    engine.close()
    assert (first == copies[0]).all()
    assert (rows == copies[1]).all()


def test_the_context_bounds_the_sequence(path: Path) -> None:
    with GgufEngine(path, threads=1, context=20) as engine:
        assert (engine.context, engine.longest_chunk) == (20, 20)
        engine.prefill(some_tokens(20))
        with pytest.raises(EdgekitError, match="^1 token after the 20 processed do not fit"):
            engine.decode(9)
        with pytest.raises(EdgekitError, match="^prompt of 21 tokens does not fit the context of"):
            engine.score(some_tokens(21), 0)
        assert engine.position == 0


def test_a_context_beyond_the_model_is_refused(path: Path) -> None:
    with pytest.raises(EdgekitError, match="context must be 1 to 2048 for .*tiny.gguf, not 2049$"):
        GgufEngine(path, context=2049)


def test_tokens_outside_the_vocabulary_never_reach_the_library(engine: GgufEngine) -> None:
    for token in (-1, VOCAB, 1 << 40):
        with pytest.raises(EdgekitError, match=f"token id {token} is outside the vocabulary"):
            engine.decode(token)
    with pytest.raises(EdgekitError, match="holds no token"):
        engine.prefill([])
    with pytest.raises(EdgekitError, match="first position to score must be 0 to 2, not 3"):
        engine.score([9, 9, 9], 3)


def test_a_closed_engine_says_so(engine: GgufEngine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(EdgekitError, match="the gguf engine is closed"):
        engine.prefill([9])
    with pytest.raises(EdgekitError, match="the gguf engine is closed"):
        engine.score([9, 9], 0)


def test_opened_by_name_it_knows_itself(path: Path) -> None:
    with load_engine("gguf", path, threads=2) as engine:
        assert (engine.name, engine.context, engine.vocab_size) == ("gguf", 2048, VOCAB)
        assert engine.version.startswith("0.3.")
        assert 7 in engine.eos_ids  # the file's own, and others that llama.cpp knows by their text
        two_threads = engine.prefill(some_tokens(5))
    with load_engine("gguf", path, threads=1) as engine:
        np.testing.assert_allclose(engine.prefill(some_tokens(5)), two_threads, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "asked", "prompt", "decode"),
    [
        ("Q8_0", None, 3, 1),  # 6.5 MB are read for a token
        ("F32", None, 3, 3),  # 24 MB
        ("Q8_0", 2, 2, 2),
    ],
)
def test_a_small_model_decodes_with_one_thread_unless_a_number_is_given(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    asked: int | None,
    prompt: int,
    decode: int,
) -> None:
    monkeypatch.setattr("edgekit.runtime.engines.engine.default_threads", lambda: 3)
    with GgufEngine(write_foreign_gguf(tmp_path / "m.gguf", kind), asked, 64) as engine:
        assert engine.threads == Threads(prompt, decode)
        assert llama.llama_n_threads_batch(engine._handle) == prompt
        assert llama.llama_n_threads(engine._handle) == decode
        whole = engine.prefill([11, 12, 13])
        engine.reset()
        engine.prefill([11, 12])
        assert divergence(engine.decode(13)[None], whole[None]) < 1e-5


def test_several_are_open_at_once(path: Path, engine: GgufEngine) -> None:
    first = engine.prefill([11, 12])
    with GgufEngine(path, threads=1, context=64) as other:
        assert (other.prefill([11, 12]) == first).all()
        second = other.decode(13)
    assert (engine.decode(13) == second).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "machine", "mapped"),
    [
        ("F32", "x86_64", True),
        ("Q8_0", "x86_64", True),
        ("Q8_0", "aarch64", False),
        ("Q4_0", "x86_64", False),
    ],
)
def test_what_is_repacked_is_not_mapped_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, machine: str, mapped: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    path = write_foreign_gguf(tmp_path / "m.gguf", kind)
    with GgufEngine(path, threads=1, context=64) as engine:
        assert (str(path) in Path("/proc/self/maps").read_text()) is mapped
        assert np.isfinite(engine.prefill([11, 12])).all()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_an_engine_that_is_dropped_frees_its_model(path: Path) -> None:
    engine = GgufEngine(path, threads=1, context=64)
    release = engine._release
    del engine
    assert not release.alive


def test_what_llama_cpp_refuses_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_foreign_gguf(tmp_path / "m.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(EdgekitError) as caught:
        GgufEngine(path)
    said = f"llama.cpp cannot load {path}: tensor 'blk.1.ffn_up.weight' not found"
    assert str(caught.value) == said
    assert capfd.readouterr() == ("", "")


def test_llama_cpp_writes_nothing(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with GgufEngine(path, threads=2) as engine:
        engine.prefill([11, 12, 13])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kept", [0, 4, 100, 100_000, -1])
def test_a_truncated_file_is_refused_before_llama_cpp_sees_it(
    path: Path, tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_engine, "load_model", None)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(EdgekitError, match="cut.gguf: is (truncated|damaged|not a GGUF)"):
        GgufEngine(cut)


def test_a_file_without_a_context_length_is_refused(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(path.read_bytes().replace(b"lfm2.context_length", b"lfm2.context_lengtX"))
    with pytest.raises(EdgekitError, match=r"lfm2\.context_length must be a number of positions"):
        GgufEngine(other)


def test_an_assertion_of_ggml_ends_the_process_with_one_line() -> None:
    code = (
        "from edgekit.runtime.engines.gguf import library as llama_library\n"
        "llama_library.start()\n"
        "said = b'GGML_ASSERT(%s) failed', b'a / b: c'\n"
        "llama_library.llama._lib.ggml_abort(b'/x/ggml.c', 12, *said)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = "edgekit: llama.cpp gave up: ggml.c:12: GGML_ASSERT(a / b: c) failed\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_a_missing_run_time_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "llama_cpp", "edgekit.runtime.engines.gguf")
    message = f"the gguf engine needs llama-cpp-python: {install_command('gguf')}"
    with pytest.raises(EngineMissing, match=f"^{re.escape(message)}$"):
        import_engine("gguf")


def test_running_a_file_imports_no_torch() -> None:
    code = (
        "import sys, edgekit.runtime.engines.gguf.decoder\n"
        "heavy = {'torch', 'executorch', 'onnxruntime', 'gguf'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
