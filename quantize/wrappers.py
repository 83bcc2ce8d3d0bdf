"""Modules that stand around another one, for which that one has to be given."""

from torch import nn

from edgekit.errors import EdgekitError

# By name: the classes of compilation and sharding take seconds to import.
_INSIDE = {
    "OptimizedModule": ("is compiled by torch.compile", "_orig_mod"),
    "DistributedDataParallel": ("is wrapped in DistributedDataParallel", "module"),
    "DataParallel": ("is wrapped in DataParallel", "module"),
    "FullyShardedDataParallel": ("is wrapped in FullyShardedDataParallel", "module"),
    "AveragedModel": ("is an average of models", "module"),
}


def refuse_wrapped(model: nn.Module, then: str = "") -> None:
    """Raise EdgekitError where a module, or one in it, stands around another.

    `then` says when the wrapper's turn comes.
    """
    for path, part in model.named_modules():
        name = path or type(model).__name__
        kinds = [kind.__name__ for kind in type(part).__mro__]
        found = next((_INSIDE[kind] for kind in kinds if kind in _INSIDE), None)
        if found is not None:
            what, attribute = found
            place = f"model.{path}.{attribute}" if path else f"model.{attribute}"
            raise EdgekitError(f"{name}: {what}: give the module inside, {place}{then}")
        if "ScriptModule" in kinds:
            raise EdgekitError(
                f"{name}: is TorchScript, in which nothing can be replaced: give the "
                "torch.nn.Module that it was made of"
            )
