"""JLCM for one linear layer: from a float weight and its inputs in calibration to codebooks.

A reconstruction of arXiv 2309.17361, whose hyper-parameters are not public: sensitivity-weighted
k-means (`kmeans`), joint learning of codebook and mapping (`learn`) and, which is not the paper's,
coordinate descent from there (`settle`).
"""

from torch import Tensor

from edgekit.quantize.by_scheme import fit_codebooks
from edgekit.quantize.codebook.learn import Learning, learn
from edgekit.quantize.codebook.output import OutputError
from edgekit.quantize.codebook.settle import settle
from edgekit.quantize.gptq import Inputs
from edgekit.quantize.schemes.codebook import Codebook
from edgekit.quantize.tensor import QuantizedTensor

ROUNDS = 3
"""Rounds of coordinate descent; more lower the error by a few per cent of itself."""


def weighted_kmeans(weight: Tensor, inputs: Inputs, scheme: Codebook) -> QuantizedTensor:
    """Fit codebooks to a weight, each column's errors weighed by its inputs' mean square.

    ValueError for shapes that do not fit, values that are not finite.
    """
    importance = inputs.hessian_of(weight).diagonal()
    return fit_codebooks(scheme, weight.detach().float(), importance)


def jlcm(
    weight: Tensor,
    inputs: Inputs,
    scheme: Codebook,
    learning: Learning | None = None,
    rounds: int = ROUNDS,
) -> QuantizedTensor:
    """Learn codebooks, scales and indices that bring a layer's output nearest to what it should be.

    That are the outputs Z of `edgekit.quantize.gptq.Inputs`. A fixed table stays as it is.
    ValueError as `weighted_kmeans`.
    """
    learning = learning or Learning()
    exact = weight.detach().float()
    error = OutputError.of(exact, inputs)
    start = fit_codebooks(scheme, exact, error.importance)
    fixed = scheme.is_table
    learned = learn(exact, start, error, learning, fixed=fixed)
    return settle(learned, error, rounds, fixed=fixed) if rounds else learned
