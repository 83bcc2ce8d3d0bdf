"""How codes may have been chosen, by the names that users give and files record."""

from typing import Literal, get_args

Method = Literal["rtn", "mse", "gptq", "kmeans", "weighted-kmeans", "jlcm"]
"""rtn: rounded to nearest, ranges by minimum and maximum; mse: ranges of least squared error; gptq:
on a text; codebooks by k-means, by one that weighs errors by what a layer sees in a text, or
learned on it."""
METHODS: tuple[Method, ...] = get_args(Method)
RECORDED = (*METHODS, "qat")
"""What a file of codes may say; qat: trained."""

RangeMethod = Literal["minmax", "mse"]
"""minmax: cover every value. mse: the storable scale of least squared error."""
RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
