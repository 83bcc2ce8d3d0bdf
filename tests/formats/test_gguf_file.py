"""The reader of GGUF heads: what it reads, and hostile files of every kind."""

import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf as peer
import numpy as np
import pytest
from support import gguf_bytes as make
from support.gguf_models import small_model_file

from edgekit.errors import EdgekitError
from edgekit.formats.gguf.file import TYPES, GgufArray, GgufFile
from edgekit.runtime.engines.gguf.checks import check_model

KEYS = [
    make.key("general.architecture", make.STRING, make.text("lfm2")),
    make.key("some.number", make.UINT32, struct.pack("<I", 7)),
    make.key("some.flag", make.BOOL, b"\2"),
    make.key("some.ratio", make.FLOAT32, struct.pack("<f", 0.5)),
    make.key("some.words", make.ARRAY, make.array(make.STRING, 2, make.text("é") + make.text(b""))),
    make.key("some.numbers", make.ARRAY, make.array(make.INT32, 3, struct.pack("<3i", -1, 0, 5))),
]
INFOS = [make.info("a.weight", (64, 2), make.Q8_0), make.info("b", (3,), offset=160)]
DATA = bytes(range(136)) + bytes(24) + bytes(12)
GOOD = make.gguf(KEYS, INFOS, DATA)


def opened(folder: Path, content: bytes) -> GgufFile:
    path = folder / "some.gguf"
    path.write_bytes(content)
    return GgufFile.open(path)


def refused(folder: Path, content: bytes, *words: str) -> None:
    with pytest.raises(EdgekitError) as refusal:
        opened(folder, content)
    message = str(refusal.value)
    assert "some.gguf: " in message
    assert message.isprintable()
    assert len(message) < 500
    for word in words:
        assert word in message


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_is_read(tmp_path: Path, version: int) -> None:
    file = opened(tmp_path, make.gguf(KEYS, INFOS, DATA, version=version))
    assert file.version == version
    plain = {key: file.metadata[key] for key in list(file.metadata)[:4]}
    assert plain == {
        "general.architecture": "lfm2",
        "some.number": 7,
        "some.flag": True,
        "some.ratio": 0.5,
    }
    assert file.array("some.words").strings() == ["é", ""]
    assert file.array("some.numbers").numbers().tolist() == [-1, 0, 5]
    first, second = file.tensors.values()
    assert (first.type, first.shape, first.nbytes) == ("Q8_0", (2, 64), 136)
    assert file.data(first) == DATA[:136]
    assert file.data(first, 10, 3) == DATA[10:13]
    assert (second.name, second.type, second.shape, second.offset) == (
        "b",
        "F32",
        (3,),
        first.offset + 160,
    )
    assert file.file_bytes == second.offset + 12


def test_types_are_those_of_gguf_py() -> None:
    own = {name: (block, size) for name, block, size in TYPES.values()}
    known = {kind.name: sizes for kind, sizes in peer.GGML_QUANT_SIZES.items()}
    # gguf-py counts Q8_1 with float32 scales, ggml has float16 ones; Q2_0 is newer than gguf-py.
    assert own.pop("Q8_1") == (32, 36)
    assert known.pop("Q8_1")
    assert {name: own[name] for name in known} == known
    for number, (name, _, _) in TYPES.items():
        if name != "Q2_0":
            assert peer.GGMLQuantizationType[name] == number


def test_a_large_vocabulary_takes_memory_of_its_own_size(tmp_path: Path) -> None:
    """gguf-py makes an object of every number."""
    words = b"".join(make.text(f"token-{i}") for i in range(200_000))
    keys = [
        make.key("tokenizer.ggml.tokens", make.ARRAY, make.array(make.STRING, 200_000, words)),
        make.key("t.types", make.ARRAY, make.array(make.INT32, 1 << 20, bytes(4 << 20))),
    ]
    path = tmp_path / "large.gguf"
    path.write_bytes(make.gguf(keys, []))
    tracemalloc.start()
    file = GgufFile.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.array("tokenizer.ggml.tokens").count == 200_000
    assert peak < 4 * path.stat().st_size


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(EdgekitError, match="some.gguf: "):
            opened(tmp_path, GOOD[:length])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"PK\3\4" + GOOD[4:], "is not a GGUF file"),
        (make.gguf(KEYS, INFOS, DATA, version=1), "version 1"),
        (make.gguf(KEYS, INFOS, DATA, version=4), "version 4"),
        (make.gguf(KEYS, INFOS, DATA, version=3 << 24), "big-endian"),
        (make.gguf(KEYS, INFOS, DATA, key_count=1 << 60), "1152921504606846976 keys"),
        (make.gguf(KEYS, INFOS, DATA, key_count=60_000), "a key has"),
        (make.gguf(KEYS, INFOS, DATA, tensor_count=1 << 63), "9223372036854775808 tensors"),
        (make.gguf(KEYS, INFOS, DATA, tensor_count=60_000), ": "),
        (make.gguf([*KEYS, KEYS[1]], INFOS, DATA), "has the key some.number twice"),
        (make.gguf([*KEYS, make.key("", 0, b"\0")], INFOS, DATA), "empty key"),
        (make.gguf([make.key("k" * 70_000, 0, b"\0")], []), "a key has 70000 bytes"),
        (make.gguf([make.text(b"\xff\xfe") + bytes(5)], []), "not UTF-8"),
        (make.gguf([make.key("k", 13, b"\0")], []), "unknown type 13"),
        (make.gguf([make.key("k", 1 << 31, b"\0")], []), "unknown type"),
        (make.gguf([make.key("k", 8, struct.pack("<Q", 1 << 62))], []), "needs 46116860184"),
        (make.gguf([make.key("k", 9, make.array(9, 1, b""))], []), "array of the unsupported"),
        (make.gguf([make.key("k", 9, make.array(10, 1 << 61, b""))], []), "needs"),
        (make.gguf([make.key("k", 9, make.array(8, 1 << 61, b""))], []), "needs"),
        (make.gguf([make.key("k", 9, make.array(8, 2, make.text("a")))], []), "truncated"),
    ],
)
def test_a_head_that_cannot_be(tmp_path: Path, content: bytes, words: str) -> None:
    refused(tmp_path, content, words)


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        ([make.info("n" * 64, (3,))], "a tensor's name has 64 bytes"),
        ([make.info("n", ())], "has 0 axes"),
        ([make.info("n", (1, 1, 1, 1, 3))], "has 5 axes"),
        ([make.info("n", (3,), kind=4)], "unknown type 4"),
        ([make.info("n", (3,), kind=99)], "unknown type 99"),
        ([make.info("n", (33,), kind=make.Q8_0)], "Q8_0 has blocks of 32"),
        ([make.info("n", (0, 3))], "impossible shape"),
        ([make.info("n", (1 << 32, 1 << 32))], "impossible shape"),
        ([make.info("n", (1 << 63, 2))], "impossible shape"),
        ([make.info("n", (1 << 40,))], "is truncated: tensor n ends at byte"),
        ([make.info("n", (3,), offset=32)], "lies at offset 32, not at 0"),
        ([make.info("n", (3,)), make.info("n", (3,), offset=32)], "the tensor n twice"),
        ([make.info("n", (16,)), make.info("m", (3,), offset=32)], "offset 32, not at 64"),
        ([make.info("n", (3,)), make.info("m", (3,), offset=0)], "offset 0, not at 32"),
        ([make.info("n", (3,)), make.info("m", (3,), offset=1 << 63)], "lies at offset"),
        ([make.info("\x1b[2J", (0,))], "tensor '\\x1b[2J'"),
    ],
)
def test_a_tensor_that_cannot_be(tmp_path: Path, infos: list[bytes], words: str) -> None:
    refused(tmp_path, make.gguf(KEYS, infos, bytes(128)), words)


@pytest.mark.parametrize("value", [0, 3, 48, 1 << 21, (1 << 32) - 1])
def test_an_alignment_that_cannot_be(tmp_path: Path, value: int) -> None:
    keys = [make.key("general.alignment", make.UINT32, struct.pack("<I", value))]
    refused(tmp_path, make.gguf(keys, INFOS, DATA), "general.alignment is", "power of two")


def test_an_alignment_of_another_type(tmp_path: Path) -> None:
    keys = [make.key("general.alignment", make.UINT64, struct.pack("<Q", 32))]
    refused(tmp_path, make.gguf(keys, INFOS, DATA), "not of type uint32")


def test_an_alignment_moves_the_data(tmp_path: Path) -> None:
    keys = [make.key("general.alignment", make.UINT32, struct.pack("<I", 64))]
    infos = [make.info("n", (3,)), make.info("m", (3,), offset=64)]
    file = opened(tmp_path, make.gguf(keys, infos, bytes(200)))
    assert [tensor.offset % 64 for tensor in file.tensors.values()] == [0, 0]


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(EdgekitError, match=words):
            GgufFile.open(path)


def test_an_array_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="has no array some.number"):
        opened(tmp_path, GOOD).array("some.number")


LOADER = """
import ctypes, sys
import llama_cpp
quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
for line in sys.stdin:
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(line.strip().encode(), parameters)
    if model:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = 64
        parameters.n_threads = parameters.n_threads_batch = 1
        context = llama_cpp.llama_init_from_model(model, parameters)
        if context:
            tokens = (ctypes.c_int32 * 4)(1, 20, 30, 40)
            llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, 4))
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    print("loaded" if model else "refused", flush=True)
"""


class Loader:
    """llama.cpp in a process of its own, which loads files and runs four tokens."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", LOADER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def survives(self, path: Path) -> bool:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline() in ("loaded\n", "refused\n")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def test_a_file_with_a_wrong_byte_is_refused_or_survived(tmp_path: Path) -> None:
    """A flipped bit anywhere; in the keys and the tensors' places more often than chance has it."""
    good = small_model_file(tmp_path).read_bytes()
    head = GgufFile.open(tmp_path / "model.gguf").head_bytes
    words = good.index(b"tokenizer.ggml.tokens")
    rest = good.index(b"tokenizer.ggml.bos_token_id")
    zones = [(0, words + 60), (rest, head), (0, head), (0, len(good))]
    draw = random.Random(0)
    loader = Loader()
    path = tmp_path / "flipped.gguf"
    accepted = 0
    for _ in range(300):
        content = bytearray(good)
        content[draw.randrange(*draw.choice(zones))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            check_model(GgufFile.open(path))
        except EdgekitError as error:
            assert str(error).isprintable()
            continue
        accepted += 1
        assert loader.survives(path), path
    loader.close()
    assert 50 < accepted < 250


def u32(name: str, value: int) -> tuple[str, int, bytes]:
    return name, make.UINT32, struct.pack("<I", value & 0xFFFFFFFF)


def each(name: str, *values: int) -> tuple[str, int, bytes]:
    packed = struct.pack(f"<{len(values)}i", *values)
    return name, make.ARRAY, make.array(make.INT32, len(values), packed)


def f32(name: str, value: float) -> tuple[str, int, bytes]:
    return name, make.FLOAT32, struct.pack("<f", value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (u32("lfm2.block_count", 0), "block_count is 0"),
        (u32("lfm2.block_count", 513), "block_count is 513"),
        (u32("lfm2.nextn_predict_layers", 3), "nextn_predict_layers is 3"),
        (u32("lfm2.expert_count", 1025), "expert_count is 1025"),
        (u32("lfm2.expert_used_count", 2), "uses 2 of 0 experts"),
        (u32("lfm2.expert_group_count", 2), "2 groups of experts"),
        (u32("lfm2.attention.head_count", 0), "head_count is 0"),
        (u32("lfm2.attention.head_count", 3), "does not divide"),
        (u32("lfm2.attention.head_count_kv", 3), "3 heads for keys and values"),
        (each("lfm2.attention.head_count_kv", 0, 0), "its layers are all convolutions"),
        (each("lfm2.attention.head_count_kv", 2, 2), "its layers are all attention"),
        (u32("lfm2.attention.value_length", 32), "value_length is 32, not 16"),
        (u32("lfm2.rope.dimension_count", 5), "dimension_count is 5"),
        (f32("lfm2.attention.layer_norm_rms_epsilon", -1.0), "epsilon is -1.0"),
        (f32("lfm2.attention.layer_norm_rms_epsilon", float("nan")), "epsilon is nan"),
        (("lfm2.rope.scaling.type", make.STRING, make.text("odd")), "scaling.type is 'odd'"),
        (u32("tokenizer.ggml.bos_token_id", 999_999), "bos_token_id is 999999"),
        (
            ("tokenizer.ggml.eos_token_id", make.UINT64, struct.pack("<Q", 1 << 40)),
            "eos_token_id is 1099511627776",
        ),
        (u32("split.count", 2), "one of 2 parts"),
    ],
)
def test_what_llama_cpp_would_not_survive_is_refused(
    tmp_path: Path, changed: tuple[str, int, bytes], words: str
) -> None:
    path = with_key(small_model_file(tmp_path), *changed)
    with pytest.raises(EdgekitError, match="model.gguf: ") as refusal:
        check_model(GgufFile.open(path))
    assert words in str(refusal.value)


@pytest.mark.parametrize(("once", "instead"), [("Ġthe", "Ġthe"), ("Ġth", "Ġth\0")])
def test_a_token_that_stands_twice_is_refused(tmp_path: Path, once: str, instead: str) -> None:
    """Also one that does for llama.cpp, which reads up to a zero byte."""
    path = small_model_file(tmp_path)
    content = path.read_bytes()
    other = make.text("Ġand")
    assert content.count(make.text(once)) == content.count(other) == 1
    assert len(make.text(instead)) == len(other)
    path.write_bytes(content.replace(other, make.text(instead)))
    with pytest.raises(EdgekitError, match="1 of its tokenizer.ggml.tokens stand there twice"):
        check_model(GgufFile.open(path))


@pytest.mark.parametrize(
    ("name", "kind"), [("blk.0.attn_norm.weight", 26), ("token_embd.weight", 8)]
)
def test_a_type_that_has_no_product_is_refused(tmp_path: Path, name: str, kind: int) -> None:
    """F32 becomes I32, which is as long; and BF16 becomes I16."""
    path = small_model_file(tmp_path, scheme="float")
    content = bytearray(path.read_bytes())
    tensor = GgufFile.open(path).tensors[name]
    place = content.index(make.text(name)) + len(make.text(name)) + 4 + 8 * len(tensor.shape)
    content[place : place + 4] = struct.pack("<I", 25 if tensor.type == "BF16" else kind)
    path.write_bytes(content)
    with pytest.raises(EdgekitError, match=r"which no product takes|F32 alone"):
        check_model(GgufFile.open(path))


def test_a_good_file_passes_the_checks(tmp_path: Path) -> None:
    check_model(GgufFile.open(small_model_file(tmp_path)))


def with_key(path: Path, name: str, kind: int, value: bytes) -> Path:
    """Replace a key of a file, or add it."""
    file, content = GgufFile.open(path), path.read_bytes()
    keys, infos = [], []
    for known, old in file.metadata.items():
        if known != name:
            keys.append(packed(known, old))
    keys.append(make.key(name, kind, value))
    number = {stored: i for i, (stored, _, _) in TYPES.items()}
    base = next(iter(file.tensors.values())).offset
    infos = [
        make.info(tensor.name, tensor.shape[::-1], number[tensor.type], tensor.offset - base)
        for tensor in file.tensors.values()
    ]
    path.write_bytes(make.gguf(keys, infos, content[base:]))
    return path


def packed(name: str, value: object) -> bytes:
    if isinstance(value, GgufArray):
        return make.key(name, make.ARRAY, make.array(value.type, value.count, bytes(value.packed)))
    if isinstance(value, bool):
        return make.key(name, make.BOOL, bytes([value]))
    if isinstance(value, int):
        return make.key(*u32(name, value))
    if isinstance(value, float):
        return make.key(*f32(name, value))
    assert isinstance(value, str)
    return make.key(name, make.STRING, make.text(value))


def test_numbers_come_without_a_copy(tmp_path: Path) -> None:
    numbers = opened(tmp_path, GOOD).array("some.numbers").numbers()
    assert numbers.dtype == np.int32
    assert not numbers.flags.owndata
