"""From a traced module to an ExecuTorch program whose matrices run in XNNPACK."""

import functools
import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec
from executorch.exir.backend.utils import WhyNoPartition
from executorch.exir.graph_module import get_control_flow_submodules
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.infra.partitioner import Partition

from edgekit.exporters.executorch.nodes import CAUSAL_ATTENTION, CONFIGS
from edgekit.exporters.heap import trim_heap
from edgekit.models.decoder import Decoder

_PARTITIONER = "executorch.backends.xnnpack.partition.config"
_LruCache = type(functools.lru_cache(lambda: None))


def trace(model: Decoder) -> ExportedProgram:
    """Trace `forward(tokens [1, n], input_pos [1])` for any n from 1 to the context."""
    tokens = torch.zeros(1, min(3, model.context), dtype=torch.long)
    lengths = Dim("n", min=1, max=model.context)
    with torch.no_grad(), _quiet():
        return export(
            model,
            (tokens, torch.zeros(1, dtype=torch.long)),
            dynamic_shapes=({1: lengths}, None),
            strict=False,
        )


def delegate(traced: ExportedProgram, metadata: dict[str, Any]) -> EdgeProgramManager:
    """Give XNNPACK what it takes; `metadata` become the program's constant methods."""
    with torch.no_grad(), _quiet(), _rare_garbage_collection():
        return to_edge_transform_and_lower(
            traced,
            partitioner=[_StagePartitioner()],
            # The dim-order pass and the verifiers re-run the whole graph for nothing: every
            # tensor is contiguous, and the file is verified in the engine afterwards.
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=metadata,
        )


def plan_memory(edge: EdgeProgramManager) -> ExecutorchProgramManager:
    """Turn the edge program into one that ExecuTorch runs."""
    with torch.no_grad(), _quiet():
        return edge.to_executorch(
            ExecutorchBackendConfig(
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            )
        )


def write_program(program: ExecutorchProgramManager, path: Path) -> None:
    """Write the `.pte` piece by piece, without joining it in memory first."""
    with path.open("wb") as file:
        program.write_to_file(file)


class _StagePartitioner(XnnpackPartitioner):  # type: ignore[misc]  # executorch is untyped
    """XNNPACK's partitioner without the work that the traced operators make needless."""

    def __init__(self) -> None:
        super().__init__([*ALL_PARTITIONER_CONFIGS, *CONFIGS])
        # With this key XNNPACK's preprocessing runs one of its 17 graph passes, the one that
        # restores linears; the others rewrite operators that `XnnpackBlocks` never emits.
        self.delegation_spec = DelegationSpec(
            "XnnpackBackend", [CompileSpec("dqlinear_partitioner", b"")]
        )

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[torch.fx.Node], bool] | None]:
        """Keep linears whole; no filter, which would cost two more decompositions of the graph."""
        return [torch.ops.aten.linear.default], None

    def generate_partitions(self, ep: ExportedProgram) -> list[Partition]:
        """Cut the graph only where an operator outside XNNPACK stands between two that are inside.

        What shares a stage is one delegate, and no way out of a delegate leads back into it. The
        stock search for pairs to merge takes quadratic time and leaves three times as many.
        """
        taken = {node for group in self.get_matched_nodes_from_configs(ep) for node in group}
        taken = {node for node in taken if not _is_lone_view(node, taken)}
        stages = _stages(ep.graph, taken)
        parts: dict[int, Partition] = {}
        for node in ep.graph.nodes:
            if node in taken:
                parts.setdefault(stages[node], Partition(id=stages[node])).add_node(node)
        return [*parts.values(), *_in_branches(ep.graph_module, first_id=len(ep.graph.nodes))]


def _stages(graph: Graph, taken: set[Node]) -> dict[Node, int]:
    """Return for each node how often the longest way to it leaves XNNPACK."""
    stages: dict[Node, int] = {}
    constants: dict[Node, None] = {}
    for node in graph.nodes:
        reached = (
            stages[arg] + (arg in taken and node not in taken) for arg in node.all_input_nodes
        )
        stages[node] = max(reached, default=0)
        if node in taken and all(arg in constants for arg in node.all_input_nodes):
            constants[node] = None
    for node in reversed(constants):  # weights and their scales go where they are used
        users = (stages[user] for user in node.users if user in taken)
        stages[node] = min(users, default=stages[node])
    return stages


def _in_branches(module: GraphModule, first_id: int) -> list[Partition]:
    """Return one part for each attention in a branch of the graph, where nothing else is taken."""
    attentions = (
        node
        for _, branch, _ in get_control_flow_submodules(module)
        for node in branch.graph.nodes
        if _name(node) == CAUSAL_ATTENTION
    )
    return [Partition(id=first_id + i, nodes=[node]) for i, node in enumerate(attentions)]


def _name(node: Node) -> str:
    """Return the name of the operator that a node calls, as in `aten.view_copy.default`."""
    return str(getattr(node.target, "__name__", ""))


def _is_lone_view(node: Node, taken: set[Node]) -> bool:
    """Whether a view has no neighbour in XNNPACK: outside it costs nothing, inside a copy."""
    neighbours = {*node.all_input_nodes, *node.users}
    return _name(node) == "aten.view_copy.default" and not neighbours & taken


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Collect seldom: graph passes allocate millions of objects, most of them long-lived.

    Not never: abandoned graphs are cycles that hold constants. Lowering an LFM2-350M peaked at
    1.6 GB with these thresholds and at 1.8 GB without any collection.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def release_traces() -> None:
    """Free what lowering left in globals: one graph node or shape there holds every constant."""
    for module in _loaded(_PARTITIONER):
        logger = getattr(module, "why", None)  # keeps the last node it was told of
        if isinstance(logger, WhyNoPartition):
            logger.node = None
    for scope in (ShapeEnv, *_loaded("executorch.exir")):
        for function in list(vars(scope).values()):
            if isinstance(function, _LruCache):
                function.cache_clear()
    FakeTensorMode.cache_clear()
    for found in gc.get_objects():
        if type(found) is ShapeEnv:
            found.fake_tensor_cache.clear()
    gc.collect()
    trim_heap()


def _loaded(prefix: str) -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide deprecation warnings between torch and ExecuTorch: a user can do nothing about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
