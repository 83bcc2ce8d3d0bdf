"""Numbers of a training that live in the module, so that what copies the module takes them along.

They are buffers that no `state_dict` has. `copy.deepcopy` copies them with the module; torch's
`AveragedModel` keeps them in step with the module it averages, or averages them too
(`use_buffers=True`); `DistributedDataParallel` gives all processes those of the first; `to` moves
them.
"""

import torch
from torch import Tensor, nn


class Carried:
    """One such tensor; after `remove` the training has it alone."""

    def __init__(self, owner: nn.Module, name: str, values: Tensor) -> None:
        owner.register_buffer(name, values, persistent=False)
        self._owner, self._name = owner, name
        self._removed: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """The tensor as it is now."""
        if self._removed is not None:
            return self._removed
        found = getattr(self._owner, self._name)
        assert isinstance(found, Tensor)
        return found

    def as_parameter(self) -> nn.Parameter:
        """Return the tensor for an optimizer; one that was moved is made a parameter again."""
        found = self.values
        if not isinstance(found, nn.Parameter):
            found = nn.Parameter(found.detach().clone())
            if self._removed is not None:
                self._removed = found
            else:  # assigned by its name it would become a parameter of the module's
                self._owner._buffers[self._name] = found
        return found

    def write(self, values: Tensor) -> None:
        """Replace the numbers in place."""
        with torch.no_grad():
            self.values.copy_(values)

    def remove(self) -> None:
        """Take the tensor out of the module."""
        if self._removed is None:
            self._removed = self.values
            delattr(self._owner, self._name)
