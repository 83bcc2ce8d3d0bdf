"""Reading ONNX files: equal to onnx's own reader, and safe on files that are not sound."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.onnx_decoders import Form, decoder, save

from edgekit.errors import EdgekitError
from edgekit.formats.onnx.file import OnnxFile
from edgekit.formats.onnx.messages import DTYPES

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with its weights in model.onnx.data."""
    return save(Form(), tmp_path_factory.mktemp("onnx") / "model.onnx", external=True)


def small(*nodes: onnx.NodeProto, constants: list[onnx.TensorProto] | None = None) -> bytes:
    """A model with x as its input and y as its output."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    made = nodes or (helper.make_node("Relu", ["x"], ["y"]),)
    graph = helper.make_graph(made, "small", [x], [y], constants or [])
    made_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    return bytes(made_model.SerializeToString())


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(content)
    return path


def test_the_same_as_onnx_reads(model: Path) -> None:
    ours, theirs = OnnxFile.open(model), onnx.load(model)
    assert ours.file_bytes == model.stat().st_size
    assert ours.opsets == {entry.domain: entry.version for entry in theirs.opset_import}
    assert ours.ir_version == theirs.ir_version
    for node, other in zip(ours.graph.nodes, theirs.graph.node, strict=True):
        assert (node.domain, node.op_type) == (other.domain, other.op_type)
        assert (node.inputs, node.outputs) == (tuple(other.input), tuple(other.output))
        values = {a.name: helper.get_attribute_value(a) for a in other.attribute}
        assert node.attributes.keys() == values.keys()
        for name, value in values.items():
            expected = tuple(value) if isinstance(value, list) else value
            expected = value.decode() if isinstance(value, bytes) else expected
            assert node.attributes[name] == expected
    for value, proto in zip(ours.graph.inputs, theirs.graph.input, strict=True):
        dims = proto.type.tensor_type.shape.dim
        assert value.name == proto.name
        assert value.shape == tuple(d.dim_param or d.dim_value for d in dims)
    for tensor, proto in zip(ours.graph.initializers, theirs.graph.initializer, strict=True):
        array = numpy_helper.to_array(proto)
        assert (tensor.name, tensor.dtype, tensor.shape) == (proto.name, array.dtype, array.shape)
        assert ours.read(tensor) == array.tobytes()


def test_weights_are_found_in_either_file(model: Path, tmp_path: Path) -> None:
    inside, beside = OnnxFile.open(save(Form(), tmp_path / "one.onnx")), OnnxFile.open(model)
    assert beside.external_files() == [model.parent / "model.onnx.data"]
    assert inside.external_files() == []
    for one, other in zip(inside.graph.initializers, beside.graph.initializers, strict=True):
        assert inside.read(one) == beside.read(other)


def test_operators_are_counted_in_sub_graphs_too(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    choice = helper.make_tensor("choice", TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["choice"], ["y"], then_branch=branch, else_branch=branch)
    opened = OnnxFile.open(write(tmp_path, small(node, constants=[choice])))
    assert opened.operators() == {"Relu": 2, "If": 1}


def test_operators_carry_their_domain(model: Path) -> None:
    theirs = Counter((node.domain, node.op_type) for node in onnx.load(model).graph.node)
    found = OnnxFile.open(model).operators()
    assert found["com.microsoft::GroupQueryAttention"] == 3
    assert found == {f"{d}::{t}" if d else t: count for (d, t), count in theirs.items()}


def test_every_type_of_onnx_is_known_but_these() -> None:
    names = {number: name for name, number in TensorProto.DataType.items()}
    unknown = {names[number] for number in names.keys() - DTYPES.keys()}
    assert unknown == {"UNDEFINED", "COMPLEX64", "COMPLEX128", "FLOAT6E2M3", "FLOAT6E3M2"}


@pytest.mark.parametrize("number", DTYPES)
@pytest.mark.parametrize("raw", [True, False])
def test_constants_of_every_type_are_read(tmp_path: Path, number: int, raw: bool) -> None:
    if number == TensorProto.STRING:
        constant = helper.make_tensor("c", number, [3], [b"a", b"b", b"c"])
    else:
        values = np.ones((3, 5), helper.tensor_dtype_to_np_dtype(number))
        constant = numpy_helper.from_array(values, "c")
        if not raw:
            constant = helper.make_tensor("c", number, [3, 5], values)
    opened = OnnxFile.open(write(tmp_path, small(constants=[constant])))
    tensor = opened.graph.initializers[0]
    assert tensor.shape == tuple(constant.dims)
    if constant.HasField("raw_data"):
        assert opened.read(tensor) == constant.raw_data
    else:
        with pytest.raises(EdgekitError, match="c is not stored as bytes"):
            opened.read(tensor)


def test_weights_are_not_read(tmp_path: Path) -> None:
    """A sparse file of 64 GB: reading it would take minutes."""
    weight = TensorProto(name="w", data_type=TensorProto.INT8, dims=[1 << 36])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    path = write(tmp_path, small(constants=[weight]))
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(1 << 36)
    assert OnnxFile.open(path).graph.initializers[0].stored_bytes == 1 << 36


@pytest.mark.parametrize("kept", [0, 1, 2, 100, 5000, -1, -100])
def test_a_truncated_file_is_refused(model: Path, tmp_path: Path, kept: int) -> None:
    path = write(tmp_path, model.read_bytes()[:kept])
    with pytest.raises(EdgekitError, match="model.onnx: (has 0 bytes|is no ONNX model)"):
        OnnxFile.open(path)


@pytest.mark.parametrize("content", [b"GGUF\x03\0\0\0" + bytes(64), b"\0" * 100, b"{}" * 50])
def test_a_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(EdgekitError, match="is no ONNX model or is damaged"):
        OnnxFile.open(write(tmp_path, content))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="none.onnx: cannot be read: No such file"):
        OnnxFile.open(tmp_path / "none.onnx")
    with pytest.raises(EdgekitError, match="cannot be read: Is a directory"):
        OnnxFile.open(tmp_path)


def relu(source: str, target: str) -> onnx.NodeProto:
    return helper.make_node("Relu", [source], [target])


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([relu("b", "a"), relu("a", "b"), relu("x", "y")], "'Relu' uses 'b', which no node before"),
        ([relu("y", "y")], "'Relu' uses 'y', which no node before"),
        ([relu("a", "y"), relu("x", "a")], "'Relu' uses 'a', which no node before"),
        ([relu("x", "y"), relu("x", "y")], "'Relu' makes 'y', which is there already"),
        ([relu("x", "x"), relu("x", "y")], "'Relu' makes 'x', which is there already"),
        ([relu("x", "z")], "output 'y' is made by no node"),
        ([helper.make_node("Relu", ["x"], ["y"], a=1), relu("", "")], None),
    ],
)
def test_graphs_that_do_not_run_in_order_are_refused(
    tmp_path: Path, nodes: list[onnx.NodeProto], words: str | None
) -> None:
    path = write(tmp_path, small(*nodes))
    if words is None:
        OnnxFile.open(path)
        return
    with pytest.raises(EdgekitError, match=words):
        OnnxFile.open(path)


def changed(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_model_from_string(small(constants=[numpy_helper.from_array(np.ones(3), "c")]))
    change(model)
    return bytes(model.SerializeToString())


def again(model: onnx.ModelProto, part: str) -> None:
    """Repeat the first input, constant, ... of the graph."""
    items = getattr(model.graph, part)
    items.add().CopyFrom(items[0])


def set_dims(model: onnx.ModelProto, *dims: int) -> None:
    model.graph.initializer[0].ClearField("dims")
    model.graph.initializer[0].dims.extend(dims)


def nest(model: onnx.ModelProto, depth: int) -> None:
    graph = model.graph
    for _ in range(depth):
        node = graph.node.add(op_type="If")
        attribute = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH)
        graph = attribute.g


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: again(m, "input"), "input 'x' is there twice"),
        (lambda m: again(m, "output"), "output 'y' is there twice"),
        (lambda m: again(m, "initializer"), "initializer 'c' is there twice"),
        (lambda m: set_dims(m, -3), "holds a dimension of -3"),
        (lambda m: set_dims(m, 1 << 62), "holds a dimension of 4611686018427387904"),
        (lambda m: set_dims(m, 4), "tensor 'c' of 32 bytes by its shape holds 24"),
        (lambda m: set_dims(m, *[1 << 39] * 8), "tensor 'c' of [0-9]+ bytes by its shape holds 24"),
        (lambda m: set_dims(m, *[1] * 9), "is damaged: field 1 holds more than 8 numbers"),
        (lambda m: m.graph.initializer[0].ClearField("raw_data"), "of 3 values .* holds 0"),
        (lambda m: m.graph.initializer[0].double_data.append(1), "values in two ways"),
        (lambda m: setattr(m.graph.initializer[0], "data_type", 99), "'c' has the unknown type 99"),
        (lambda m: m.graph.sparse_initializer.add(), "holds sparse tensors"),
        (lambda m: m.functions.add(), "holds local functions"),
        (lambda m: m.ClearField("opset_import"), "names no operator set"),
        (lambda m: m.ClearField("graph"), "is damaged: it has no graph"),
        (lambda m: nest(m, 6), "nested more than 4 deep"),
        (lambda m: nest(m, 3000), "nested more than 4 deep"),
    ],
)
def test_unsound_models_are_refused(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], words: str
) -> None:
    with pytest.raises(EdgekitError, match=words) as caught:
        OnnxFile.open(write(tmp_path, changed(change)))
    assert "\n" not in str(caught.value)


def test_two_graphs_in_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="field [0-9]+ of the message at 0 is repeated"):
        OnnxFile.open(write(tmp_path, small() + small()))


def test_a_file_of_endless_fields_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="too many fields or too much text"):
        OnnxFile.open(write(tmp_path, b"\x78\x01" * 400_001))


def external(location: str, offset: object = 0, length: object = 24, **more: str) -> bytes:
    constant = TensorProto(name="c", data_type=TensorProto.DOUBLE, dims=[3])
    constant.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(offset), "length": str(length)} | more
    for key, value in entries.items():
        constant.external_data.add(key=key, value=value)
    return small(constants=[constant])


def test_sound_external_data_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(64))
    OnnxFile.open(write(tmp_path, external("w.bin", 40)))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (external("../w.bin"), "external data '../w.bin' could leave the folder"),
        (external("/etc/passwd"), "external data '/etc/passwd' could leave the folder"),
        (external("*/_ORT_MEM_ADDR_/*", 4096), "could leave the folder"),
        (external(""), "external data '' could leave the folder"),
        (external(".."), "could leave the folder"),
        (external("absent.bin"), "absent.bin is not there or is no file"),
        (external("folder"), "folder is not there or is no file"),
        (external("outside"), "outside is a link that leaves the folder"),
        (external("w.bin", 41), "ends at byte 65 of w.bin, which has 64: it is truncated"),
        (external("w.bin", 1 << 62), "an offset or length that is no number"),
        (external("w.bin", -1), "an offset or length that is no number"),
        (external("w.bin", " 1"), "an offset or length that is no number"),
        (external("w.bin", 0, 25), "'c' of 24 bytes by its shape states 25"),
        (external("w.bin", 0, 24, prepacked_0="x"), "unknown or repeated external entries"),
    ],
)
def test_unsound_external_data_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    folder = tmp_path / "artifact"
    (folder / "folder").mkdir(parents=True)
    (folder / "w.bin").write_bytes(bytes(64))
    (tmp_path / "secret").write_bytes(bytes(64))
    (folder / "outside").symlink_to(tmp_path / "secret")
    with pytest.raises(EdgekitError, match=words):
        OnnxFile.open(write(folder, content))


def test_the_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "a1").write_bytes(external("w.bin"))
    (blobs / "b2").write_bytes(bytes(64))
    (snapshot / "model.onnx").symlink_to(blobs / "a1")
    (snapshot / "w.bin").symlink_to(blobs / "b2")
    opened = OnnxFile.open(snapshot / "model.onnx")
    assert opened.read(opened.graph.initializers[0]) == bytes(24)


@pytest.mark.parametrize("form", [Form(layers=3), Form(layers=3, fused=False, rows="last")])
def test_no_damaged_file_ends_the_process(tmp_path: Path, form: Form) -> None:
    """Neither in our reader nor in onnxruntime behind it; 300 copies for each kind of graph."""
    path = save(form, tmp_path / "model.onnx", external=True)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from support import onnx_fuzz; onnx_fuzz.main()",
            str(path),
            "0",
            "300",
        ],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout[-40:]
    ends = Counter(line.split()[1] for line in done.stdout.splitlines())
    assert ends.keys() == {"ran", "refused"}
    assert ends.total() == 300


def test_the_decoders_of_these_tests_are_sound() -> None:
    onnx.checker.check_model(decoder(Form(fused=False)), full_check=True)
