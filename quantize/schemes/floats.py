"""The scheme of tensors that stay as they are."""

import math
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Float:
    """A float weight, computed with in float32."""

    name: ClassVar[str] = "float"
    bits: ClassVar[None] = None
    granularity: ClassVar[None] = None
    group_size: ClassVar[None] = None
    axis: ClassVar[None] = None
    default_range: ClassVar[None] = None
    is_float: ClassVar[bool] = True
    symmetric: ClassVar[bool] = True
    two_levels: ClassVar[bool] = False

    @property
    def as_int8(self) -> "Float":
        """The scheme itself: it has no codes to widen."""
        return self

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Do nothing: a weight of any shape may stay as it is."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return 4 bytes (float32) for each element."""
        return 4 * math.prod(shape)


FLOAT = Float()
