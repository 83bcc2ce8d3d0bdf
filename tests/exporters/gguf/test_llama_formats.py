"""llama.cpp's own formats: bytes against ggml and gguf-py, and llama-quantize if present."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from numpy.typing import NDArray
from safetensors.torch import save_file
from support import ggml
from support.float_gguf import write_float_gguf
from torch import Tensor

from edgekit.errors import EdgekitError
from edgekit.exporters.contract.own_formats import find_format
from edgekit.exporters.gguf.llama import quantize as llama_quantize
from edgekit.exporters.gguf.llama.formats import FORMATS
from edgekit.exporters.gguf.llama.imatrix import Imatrix, Statistics, is_measured
from edgekit.exporters.gguf.llama.quantize import StoredTensor, planned_tensors, quantize_gguf
from edgekit.exporters.gguf.names import gguf_names
from edgekit.exporters.gguf.readback import StoredWeights
from edgekit.models.config import ModelConfig
from edgekit.models.source import resolve_model

# gguf-py quantizes these itself; the others are ggml's alone.
IN_PYTHON = ("F32", "Q4_0", "Q4_1", "Q8_0")


@dataclass(frozen=True)
class FloatModel:
    """A float GGUF on disk, its values by name, and an imatrix of random sums for it."""

    path: Path
    tensors: dict[str, Tensor]
    imatrix: Path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FloatModel:
    """The bundled model."""
    return float_model("lfm2-tiny", tmp_path_factory.mktemp("tiny"))


@dataclass(frozen=True)
class Quantized:
    """A file, and what `quantize_gguf` said of it."""

    path: Path
    table: list[StoredTensor]


@pytest.fixture(scope="module")
def quantized(tiny: FloatModel) -> Callable[[str, bool], Quantized]:
    """Quantize the bundled model, once per format, without or with the imatrix."""

    @cache
    def make(form: str, with_imatrix: bool) -> Quantized:
        out = tiny.path.with_name(f"{form}-{with_imatrix}.gguf")
        imatrix = tiny.imatrix if with_imatrix else None
        return Quantized(
            out, quantize_gguf(tiny.path, out, FORMATS[form], silent, imatrix=imatrix, threads=2)
        )

    return make


def float_model(model: str, place: Path) -> FloatModel:
    imatrix = place / "imatrix.gguf"
    path, tensors = write_float_gguf(model, place)
    random_imatrix({name: tuple(values.shape) for name, values in tensors.items()}).save(imatrix)
    return FloatModel(path, tensors, imatrix)


def random_imatrix(shapes: dict[str, tuple[int, ...]]) -> Imatrix:
    random = np.random.default_rng(0)
    measured = [name for name in shapes if is_measured(name, shapes)]
    entries = {
        name: Statistics(random.lognormal(0, 2, shapes[name][-1]).astype(np.float32), 1024)
        for name in measured
    }
    return Imatrix(entries, ("stories.txt",), 2, 512)


def silent(_stage: str) -> None:
    """No progress."""


def stored(path: Path) -> dict[str, tuple[GGMLQuantizationType, bytes]]:
    """Return a file's tensors as gguf-py reads them."""
    return {each.name: (each.tensor_type, each.data.tobytes()) for each in GGUFReader(path).tensors}


def expected(
    values: Tensor, kind: GGMLQuantizationType, means: NDArray[np.float32] | None
) -> bytes:
    """Return the bytes that another implementation makes of a tensor."""
    if means is None and kind.name in IN_PYTHON:
        return bytes(quants.quantize(values.numpy(), kind).tobytes())
    return ggml.quantize(values.numpy(), kind, means)


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_is_ggmls(
    tiny: FloatModel, quantized: Callable[[str, bool], Quantized], form: str, with_imatrix: bool
) -> None:
    made, means = quantized(form, with_imatrix), dict[str, NDArray[np.float32]]()
    if with_imatrix:
        means = {name: one.means() for name, one in Imatrix.load(tiny.imatrix).entries.items()}
    found = stored(made.path)
    assert found.keys() == tiny.tensors.keys()
    for name, (kind, data) in found.items():
        assert data == expected(tiny.tensors[name], kind, means.get(name)), name
    assert made.table == [
        StoredTensor(name, kind.name, tuple(tiny.tensors[name].shape), len(data))
        for name, (kind, data) in found.items()
    ]


@pytest.mark.parametrize(
    ("form", "kinds"),
    [
        ("Q4_0", {"Q4_0": 46, "Q6_K": 1}),
        ("Q8_0", {"Q8_0": 47}),
        ("Q4_K_M", {"Q4_K": 41, "Q6_K": 6}),
        ("Q5_K_M", {"Q5_K": 41, "Q6_K": 6}),
        ("Q6_K", {"Q6_K": 47}),
        ("IQ4_NL", {"IQ4_NL": 45, "Q5_K": 1, "Q6_K": 1}),
    ],
)
def test_tensors_get_the_types_of_llama_cpps_mixtures(
    tiny: FloatModel, form: str, kinds: dict[str, int]
) -> None:
    table = planned_tensors(tiny.path, FORMATS[form])
    assert Counter(each.type for each in table) == kinds | {"F32": 28}


@pytest.mark.parametrize("form", ["Q4_K_M", "Q4_0"])
def test_an_imatrix_is_part_of_the_plan(
    tiny: FloatModel, quantized: Callable[[str, bool], Quantized], form: str
) -> None:
    planned = planned_tensors(tiny.path, FORMATS[form], tiny.imatrix)
    assert planned == quantized(form, True).table
    # the first ffn_down in Q4_0 becomes Q4_1 where there is an imatrix
    assert (planned == quantized(form, False).table) is (form != "Q4_0")


def test_metadata_is_the_float_files_with_the_format(
    tiny: FloatModel, quantized: Callable[[str, bool], Quantized]
) -> None:
    before, after = metadata(tiny.path), metadata(quantized("Q4_K_M", True).path)
    assert after == before | {
        "general.file_type": 15,  # LLAMA_FTYPE_MOSTLY_Q4_K_M
        "general.quantization_version": 2,
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "stories.txt",
        "quantize.imatrix.entries_count": 46,
        "quantize.imatrix.chunks_count": 2,
    }


def metadata(path: Path) -> dict[str, Any]:
    fields = GGUFReader(path).fields
    return {
        name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")
    }


@pytest.mark.parametrize(("form", "same"), [("Q4_K_M", False), ("IQ4_NL", False), ("Q8_0", True)])
def test_an_imatrix_moves_codes_of_4_bits_and_none_of_8(
    quantized: Callable[[str, bool], Quantized], form: str, same: bool
) -> None:
    plain, weighted = (
        stored(quantized(form, choice).path)["blk.2.attn_q.weight"] for choice in (False, True)
    )
    assert plain[0] == weighted[0]
    assert (plain[1] == weighted[1]) is same


def test_text_of_the_imatrix_is_cut_between_letters(tiny: FloatModel, tmp_path: Path) -> None:
    found = Imatrix.load(tiny.imatrix)
    long = tmp_path / "imatrix.gguf"
    Imatrix(found.entries, ("é" * 100,), 2, 512).save(long)
    out = tmp_path / "out.gguf"
    quantize_gguf(tiny.path, out, FORMATS["Q4_0"], silent, imatrix=long)
    assert metadata(out)["quantize.imatrix.dataset"] == "é" * 63  # 127 bytes, and no half letter


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("with_imatrix", [False, True], ids=["plain", "imatrix"])
def test_whole_file_is_that_of_llama_quantize(
    tiny: FloatModel,
    quantized: Callable[[str, bool], Quantized],
    tmp_path: Path,
    form: str,
    with_imatrix: bool,
) -> None:
    tool = shutil.which("llama-quantize")
    if tool is None:
        # Calling llama_model_quantize here would prove nothing: that is what edgekit does.
        pytest.skip(
            "llama-quantize, another program around the same code, is not in PATH; "
            "test_every_byte_is_ggmls has compared every tensor with ggml's own quantizers"
        )
    flags = ["--imatrix", tiny.imatrix.name] if with_imatrix else []
    theirs = tmp_path / "theirs.gguf"
    command = [tool, *flags, str(tiny.path), str(theirs), form]
    subprocess.run(command, cwd=tiny.path.parent, check=True, capture_output=True)
    assert quantized(form, with_imatrix).path.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("form", FORMATS)
def test_dequantized_is_what_ggml_reads(
    tiny: FloatModel, quantized: Callable[[str, bool], Quantized], form: str
) -> None:
    path = quantized(form, False).path
    config = resolve_model("lfm2-tiny").config
    weights = StoredWeights(path, config)
    names = {stored: name for name, stored in gguf_names(config).items()}
    for name, (kind, data) in stored(path).items():
        found, exact = weights[names[name]].squeeze(), tiny.tensors[name]
        assert (found.dtype, found.shape) == (torch.float32, exact.shape)
        if kind != GGMLQuantizationType.F32:
            assert found.numpy().tobytes() == ggml.dequantize(data, kind).tobytes()
        assert (found - exact).norm() <= 0.12 * exact.norm(), name


def model_folder(place: Path, hidden: int, inner: int) -> Path:
    """Make one convolution layer of random weights."""
    place.mkdir()
    raw = {
        "model_type": "lfm2",
        "vocab_size": 64,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 7,
    }
    (place / "config.json").write_text(json.dumps(raw))
    generator = torch.Generator().manual_seed(0)
    shapes = ModelConfig.from_dict(raw).tensor_shapes()
    weights = {
        name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()
    }
    save_file(weights, place / "model.safetensors")
    return place


def test_rows_that_a_type_cannot_hold_are_told(tmp_path: Path) -> None:
    model = float_model(str(model_folder(tmp_path / "small", 64, 80)), tmp_path)
    out = tmp_path / "out.gguf"
    table = {e.name: e for e in quantize_gguf(model.path, out, FORMATS["Q4_K_M"], silent)}
    assert list(table.values()) == planned_tensors(model.path, FORMATS["Q4_K_M"])
    for name, (kind, data) in stored(out).items():
        assert (table[name].type, table[name].nbytes) == (kind.name, len(data))
        if kind.name in IN_PYTHON:
            assert data == expected(model.tensors[name], kind, None)
    query, down = table["blk.1.attn_q.weight"], table["blk.1.ffn_down.weight"]
    assert (query.type, query.instead_of) == ("Q5_0", "Q4_K")  # rows of 64 and blocks of 256
    assert (down.type, down.instead_of) == ("F16", "Q6_K")  # rows of 80: not even blocks of 32
    assert table["blk.1.attn_norm.weight"].instead_of is None


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("Q4_K_M", "Q4_K_M"),
        ("q4_k_m", "Q4_K_M"),
        ("Q4_K", "Q4_K_M"),
        ("q5_k", "Q5_K_M"),
        ("iq4_nl", "IQ4_NL"),
        ("w4g32", None),
        ("Q9_K", None),
        ("", None),
    ],
)
def test_names_are_llama_quantizes(name: str, form: str | None) -> None:
    assert find_format(name) == form


def test_progress_tells_how_far_it_is(tiny: FloatModel, tmp_path: Path) -> None:
    stages: list[str] = []
    quantize_gguf(tiny.path, tmp_path / "out.gguf", FORMATS["Q6_K"], stages.append)
    assert stages == [f"quantizing to Q6_K in llama.cpp, {x}%" for x in (0, 25, 50, 75)]


def test_an_interrupt_ends_the_work_and_leaves_nothing(tiny: FloatModel, tmp_path: Path) -> None:
    def press_ctrl_c(_stage: str) -> None:
        raise KeyboardInterrupt

    before = children()
    with pytest.raises(KeyboardInterrupt):
        quantize_gguf(tiny.path, tmp_path / "out.gguf", FORMATS["Q4_K_M"], press_ctrl_c)
    assert list(tmp_path.iterdir()) == []
    assert children() == before


def children() -> set[str]:
    tasks = Path("/proc/self/task").iterdir()
    return {pid for task in tasks for pid in (task / "children").read_text().split()}


def test_what_is_there_stays_where_llama_cpp_refuses(tmp_path: Path) -> None:
    source, out = tmp_path / "float.gguf", tmp_path / "out.gguf"
    source.write_bytes(b"no GGUF at all")
    out.write_text("kept")
    with pytest.raises(EdgekitError, match=r"llama\.cpp cannot make Q8_0: .*failed to load") as it:
        quantize_gguf(source, out, FORMATS["Q8_0"], silent)
    assert "\n" not in str(it.value)
    assert {path.name for path in tmp_path.iterdir()} == {"float.gguf", "out.gguf"}
    assert out.read_text() == "kept"


def test_quantizing_what_is_quantized_is_refused(
    quantized: Callable[[str, bool], Quantized], tmp_path: Path
) -> None:
    once, twice = quantized("Q8_0", False).path, tmp_path / "twice.gguf"
    with pytest.raises(EdgekitError, match="requantizing from type q8_0 is disabled"):
        quantize_gguf(once, twice, FORMATS["Q4_0"], silent)
    assert list(tmp_path.iterdir()) == []


def test_a_full_device_is_one_line(tiny: FloatModel, tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from edgekit.exporters.gguf.llama.formats import FORMATS\n"
        "from edgekit.exporters.gguf.llama.quantize import quantize_gguf\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "source, output = map(Path, sys.argv[1:])\n"
        "try:\n"
        "    quantize_gguf(source, output, FORMATS['Q8_0'], lambda stage: None)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    arguments = [sys.executable, "-c", script, str(tiny.path), str(tmp_path / "out.gguf")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "EdgekitError" in done.stdout
    assert f"{tmp_path}: cannot be written to: its device is full" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_without_llama_cpp_one_line_says_what_to_install(
    tiny: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_quantize, "find_spec", lambda _name: None)
    with pytest.raises(EdgekitError, match=r"Q8_0 .* pip install .*\[gguf\]'"):
        quantize_gguf(tiny.path, tmp_path / "out.gguf", FORMATS["Q8_0"], silent)


@pytest.mark.slow
def test_memory_stays_far_below_the_file(tmp_path: Path) -> None:
    """A tensor is quantized in slabs, so a table of 268 MB in float32 does not count whole."""
    folder = tmp_path / "wide"
    config = ModelConfig.load(model_folder(folder, 64, 64)).to_dict()
    config["vocab_size"] = 1 << 20
    (folder / "config.json").write_text(json.dumps(config))
    shapes = ModelConfig.from_dict(config).tensor_shapes()
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from edgekit.exporters.gguf.llama.formats import FORMATS\n"
        "from edgekit.exporters.gguf.llama.quantize import quantize_gguf\n"
        "source, output = map(Path, sys.argv[1:])\n"
        "quantize_gguf(source, output, FORMATS['Q8_0'], lambda stage: None)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    source, _ = write_float_gguf(str(folder), tmp_path)
    arguments = [str(source), str(tmp_path / "out.gguf")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 450e6
