"""How XNNPACK's graph holds the operators of `xnnpack_ops`."""

import hashlib

import torch
from executorch.backends.xnnpack.operators.node_visitor import NodeVisitor, register_node_visitor
from executorch.backends.xnnpack.partition.config.generic_node_configs import (
    GenericNodePartitionerConfig,
)
from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
from executorch.backends.xnnpack.serialization.xnnpack_graph_schema import (
    ConstantDataOffset,
    XNNAdd,
    XNNBatchMatrixMultiply,
    XNNDatatype,
    XNNDepthwiseConv2d,
    XNNGraph,
    XNNMinimum,
    XNNMultiply,
    XNNSoftmax,
    XNNStaticReshape,
    XNNStaticTranspose,
    XNNSubtract,
    XNNTensorValue,
    XNode,
    XValue,
)
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import (
    CONSTANT_TENSOR_ALIGNMENT,
)
from executorch.backends.xnnpack.utils.xnnpack_constants import (
    UINT64_MAX,
    XNN_INVALID_VALUE_ID,
)
from torch import fx

import edgekit.exporters.executorch.ops  # noqa: F401  registers edgekit::*

CAUSAL_ATTENTION = "edgekit.causal_attention.default"
_TRANSPOSE_B = 1  # XNN_FLAG_TRANSPOSE_B of xnnpack.h
_SLOPE = 1e9  # of the mask: a position one ahead loses so much that its probability is exactly 0


class _Emitter:
    """Appends nodes and values to a graph; shapes are upper bounds, XNNPACK finds the real ones."""

    def __init__(self, visitor: NodeVisitor, graph: XNNGraph, debug_handle: int) -> None:
        self._visitor, self._graph, self._handle = visitor, graph, debug_handle

    def value(self, *shape: int, constant: int = 0) -> int:
        """Define a float32 value; 0 is the index of no constant."""
        index = len(self._graph.xvalues)
        value = XNNTensorValue(
            datatype=XNNDatatype.xnn_datatype_fp32,
            num_dims=len(shape),
            dims=list(shape),
            external_id=XNN_INVALID_VALUE_ID,
            constant_buffer_idx=constant,
            flags=0,
            id_out=index,
        )
        self._graph.xvalues.append(XValue(xvalue_union=value))
        return index

    def constant(self, number: float) -> int:
        """Define a float32 constant of one element."""
        data = torch.tensor([number]).numpy().tobytes()
        key = hashlib.sha256(data).hexdigest()
        self._visitor._named_data_store.add_named_data(key, data, CONSTANT_TENSOR_ALIGNMENT)
        self._graph.constant_data.append(ConstantDataOffset(UINT64_MAX, len(data), named_key=key))
        return self.value(1, constant=len(self._graph.constant_data) - 1)

    def node(self, operator: object) -> None:
        """Append a node."""
        self._graph.xnodes.append(XNode(xnode_union=operator, debug_handle=self._handle))

    def reshape(self, source: int, target: int, *shape: int) -> int:
        """Reshape; one extent may be 0, which stands for the run-time length."""
        self.node(XNNStaticReshape(len(shape), list(shape), source, target, 0))
        return target

    def transpose(self, source: int, target: int, *order: int) -> int:
        """Permute the dimensions."""
        self.node(XNNStaticTranspose(len(order), list(order), source, target, 0))
        return target


@register_node_visitor
class CausalAttentionVisitor(NodeVisitor):  # type: ignore[misc]  # executorch is untyped
    """softmax(q k^T / sqrt(head_dim) + mask) v, batched over KV heads.

    mask = min(0, (row - column) * slope) is 0 up to the query's own position.

    The queries of a KV head's group are rows of one product, by token: `[1, kv, n * group, d]`.
    """

    target = CAUSAL_ATTENTION

    def define_node(
        self, node: fx.Node, xnn_graph: XNNGraph, vals_to_ids: dict[fx.Node, int], debug_handle: int
    ) -> None:
        """Append the nodes of one attention."""
        self.define_nodes_tensor_inputs_outputs(node, xnn_graph, vals_to_ids)
        query, keys, values, rows, columns = (vals_to_ids[arg] for arg in node.all_input_nodes)
        n, heads, width = _extents(xnn_graph, query)
        _, end, kv, _ = _extents(xnn_graph, keys)
        group = heads // kv
        emit = _Emitter(self, xnn_graph, debug_handle)

        q = emit.reshape(query, emit.value(1, n, kv, group * width), 1, 0, kv, group * width)
        q = emit.transpose(q, emit.value(1, kv, n, group * width), 0, 2, 1, 3)
        q = emit.reshape(q, emit.value(1, kv, n * group, width), 1, kv, 0, width)
        scaled = emit.value(1, kv, n * group, width)
        emit.node(XNNMultiply(q, emit.constant(width**-0.5), scaled, 0))
        k = emit.transpose(keys, emit.value(1, kv, end, width), 0, 2, 1, 3)
        scores = emit.value(1, kv, n * group, end)
        emit.node(XNNBatchMatrixMultiply(scaled, k, scores, _TRANSPOSE_B))

        behind = emit.value(n * group, end)
        row = emit.reshape(rows, emit.value(n * group, 1), 0, 1)
        emit.node(XNNSubtract(row, columns, behind, 0))
        steep = emit.value(n * group, end)
        emit.node(XNNMultiply(behind, emit.constant(_SLOPE), steep, 0))
        mask = emit.value(n * group, end)
        emit.node(XNNMinimum(steep, emit.constant(0.0), mask, 0))
        masked = emit.value(1, kv, n * group, end)
        emit.node(XNNAdd(scores, mask, masked, 0))

        probabilities = emit.value(1, kv, n * group, end)
        emit.node(XNNSoftmax(masked, probabilities, 0))
        v = emit.transpose(values, emit.value(1, kv, end, width), 0, 2, 1, 3)
        mixed = emit.value(1, kv, n * group, width)
        emit.node(XNNBatchMatrixMultiply(probabilities, v, mixed, 0))
        mixed = emit.reshape(mixed, emit.value(1, kv, n, group * width), 1, kv, 0, group * width)
        mixed = emit.transpose(mixed, emit.value(1, n, kv, group * width), 0, 2, 1, 3)
        emit.reshape(mixed, vals_to_ids[node], 0, heads * width)


@register_node_visitor
class DepthwiseConvVisitor(NodeVisitor):  # type: ignore[misc]  # executorch is untyped
    """A 2-D depthwise convolution whose height is the sequence and whose width is 1 (NHWC)."""

    target = "edgekit.depthwise_conv.default"

    def define_node(
        self, node: fx.Node, xnn_graph: XNNGraph, vals_to_ids: dict[fx.Node, int], debug_handle: int
    ) -> None:
        """Append the nodes of one convolution."""
        self.define_nodes_tensor_inputs_outputs(node, xnn_graph, vals_to_ids)
        padded, weight = (vals_to_ids[arg] for arg in node.all_input_nodes)
        rows, width = _extents(xnn_graph, padded)
        kernel = _extents(xnn_graph, weight)[1]
        emit = _Emitter(self, xnn_graph, debug_handle)
        image = emit.reshape(padded, emit.value(1, rows, 1, width), 1, 0, 1, width)
        result = emit.value(1, rows - kernel + 1, 1, width)
        emit.node(
            XNNDepthwiseConv2d(
                padding_top=0,
                padding_right=0,
                padding_bottom=0,
                padding_left=0,
                kernel_height=kernel,
                kernel_width=1,
                subsampling_height=1,
                subsampling_width=1,
                dilation_height=1,
                dilation_width=1,
                group_input_channels=1,
                group_output_channels=1,
                groups=width,
                adjustment_height=0,
                adjustment_width=0,
                input1_id=image,
                filter_id=weight,
                bias_id=XNN_INVALID_VALUE_ID,
                output_id=result,
                flags=0,
            )
        )
        emit.reshape(result, vals_to_ids[node], 0, width)


def _extents(graph: XNNGraph, value: int) -> list[int]:
    dims: list[int] = graph.xvalues[value].xvalue_union.dims
    return dims


class _AnyLength(GenericNodePartitionerConfig):  # type: ignore[misc]  # executorch is untyped
    """Takes a node whatever its run-time lengths: those of `xnnpack_ops` are right for all."""

    def supported_precision_types(self) -> list[ConfigPrecisionType]:
        """Float32 only."""
        return [ConfigPrecisionType.FP32]

    def check_constraints(self, node: fx.Node, ep: torch.export.ExportedProgram) -> bool:
        """Take every one."""
        return True


class CausalAttentionConfig(_AnyLength):
    """Partition `causal_attention`."""

    target_name = "causal_attention.default"


class DepthwiseConvConfig(_AnyLength):
    """Partition `depthwise_conv`."""

    target_name = "depthwise_conv.default"

    def get_node_and_deps(self, node: fx.Node, ep: torch.export.ExportedProgram) -> list[fx.Node]:
        """Take the weight along: XNNPACK wants it constant, not an input of the delegate."""
        return [node, node.all_input_nodes[1]]


CONFIGS = (CausalAttentionConfig, DepthwiseConvConfig)
