"""Reading a `.pte`: equal to ExecuTorch's own reader, and safe on files that are not sound."""

import random
import struct
from collections import Counter
from pathlib import Path

import pytest
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.schema import DelegateCall, KernelCall

from edgekit.errors import EdgekitError
from edgekit.exporters.executorch.readback import embedding, linears
from edgekit.exporters.inspect.report import inspect
from edgekit.formats.pte.flatbuffer import Flatbuffer, FlatbufferError
from edgekit.formats.pte.program import FORWARD, Program


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Path:
    return tiny_artifact / "model.pte"


@pytest.fixture(scope="module")
def content(model: Path) -> bytes:
    return model.read_bytes()


def read_everything(path: Path) -> None:
    """Touch all that any reader of a `.pte` touches, the weights included."""
    inspect(path)
    program = Program.open(path)
    for weight in (embedding(program), *linears(program)):
        weight.read(program)


def test_the_same_as_executorch_reads(model: Path, content: bytes) -> None:
    program, theirs = Program.open(model), deserialize_pte_binary(content)
    assert list(program.methods) == [plan.name for plan in theirs.program.execution_plan]
    plan = theirs.program.execution_plan[0]
    calls = [step.instr_args for chain in plan.chains for step in chain.instructions]
    names = [f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators]
    forward = program.methods[FORWARD]
    assert forward.operators == Counter(
        names[call.op_index] for call in calls if isinstance(call, KernelCall)
    )
    assert list(forward.delegate_calls) == [
        call.delegate_index for call in calls if isinstance(call, DelegateCall)
    ]
    assert forward.planned_bytes == sum(plan.non_const_buffer_sizes)
    blobs = [program.read(delegate.blob) for delegate in forward.delegates]
    data = theirs.program.backend_delegate_data
    assert blobs == [data[delegate.processed.index].data for delegate in plan.delegates]


def test_named_data_and_constants_are_those_executorch_reads(model: Path, content: bytes) -> None:
    program, theirs = Program.open(model), deserialize_pte_binary(content)
    named = theirs.named_data
    assert named is not None
    assert set(program.named) == set(named.pte_data)
    for key, entry in named.pte_data.items():
        assert program.read(program.named[key]) == named.buffers[entry.buffer_index]
    buffers = [buffer.storage for buffer in theirs.program.constant_buffer]
    for constant in program.methods[FORWARD].constants:
        data = program.read(constant.span)
        assert any(buffer.startswith(data) for buffer in buffers)


def test_the_file_is_not_read_whole(model: Path) -> None:
    program = Program.open(model)
    assert program.program.size < program.file_bytes / 10


def write(folder: Path, content: bytes | bytearray) -> Path:
    path = folder / "model.pte"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not an ExecuTorch program"),
        (b"PK\3\4" * 100, "not an ExecuTorch program"),
        (b"\x20\0\0\0ET99" + b"\0" * 100, "format 'ET99'"),
        (b"\x20\0\0\0ET12", "is damaged"),
        (struct.pack("<I8sIQQQ", 56, b"ET12eh00", 32, 1 << 40, 1 << 40, 9), "truncated"),
        (struct.pack("<I8sIQQQ", 56, b"ET12eh00", 32, 40, 40, 0), "is damaged"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(EdgekitError, match=words):
        read_everything(write(tmp_path, content))


def test_a_folder_or_nothing_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(EdgekitError, match="cannot be read"):
            Program.open(path)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999])
def test_a_cut_file_is_refused(content: bytes, tmp_path: Path, share: float) -> None:
    with pytest.raises(EdgekitError, match="truncated|damaged"):
        read_everything(write(tmp_path, content[: int(share * len(content))]))


def program_bytes(content: bytes) -> int:
    return int(struct.unpack_from("<Q", content, 16)[0])


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bytes_end_in_a_refusal_or_in_values(
    content: bytes, tmp_path: Path, seed: int
) -> None:
    """Damage in the program and in the delegates' graphs: never another exception, never a hang."""
    draw = random.Random(seed)
    refused = 0
    for _ in range(30):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 4, 64))):
            at = draw.randrange(8, program_bytes(content))
            damaged[at] = draw.choice((0, 255, 127, 128, draw.randrange(256)))
        try:
            read_everything(write(tmp_path, damaged))
        except EdgekitError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused  # or the damage never reached anything


@pytest.mark.parametrize("seed", range(3))
def test_damaged_delegates_end_in_a_refusal_or_in_values(
    model: Path, content: bytes, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    spans = [delegate.blob for delegate in Program.open(model).methods[FORWARD].delegates]
    refused = 0
    for _ in range(30):
        damaged = bytearray(content)
        for span in spans:
            damaged[span.offset + draw.randrange(span.size)] = draw.randrange(256)
        try:
            read_everything(write(tmp_path, damaged))
        except EdgekitError:
            refused += 1
    assert refused


def test_tables_that_share_children_do_not_multiply_the_work() -> None:
    """Many references to one table that again holds many: a million visits in 8 kB if trusted."""
    count = 1000
    vtable = struct.pack("<HHH2x", 6, 8, 4)  # one field, 4 bytes into the table
    data = struct.pack("<I4s", 16, b"TEST") + vtable
    for _ in range(2):
        start = len(data)
        references = [4 * (count - i) for i in range(count)]  # all to the byte after the vector
        data += struct.pack(f"<iII{count}I", start - 8, 4, count, *references)
    data += struct.pack("<iI", len(data) - 8, 0)
    root = Flatbuffer(data).root(b"TEST")
    children = root.tables(0)
    assert len(children) == count
    assert len(children[0].tables(0)) == count
    with pytest.raises(FlatbufferError, match="without end"):
        for child in children:
            child.tables(0)
