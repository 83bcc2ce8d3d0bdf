"""Codebooks: k-means against the optimum, gradients against formulas, descent, what is stored."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.jlcm import wanted
from edgekit.quantize.apply import sqnr_db
from edgekit.quantize.by_scheme import fit_codebooks, quantize_weight
from edgekit.quantize.codebook.fit import fit_codebook, nearest
from edgekit.quantize.codebook.grouping import balanced_clusters, group_order
from edgekit.quantize.codebook.jlcm import ROUNDS, jlcm, weighted_kmeans
from edgekit.quantize.codebook.kmeans import kmeans
from edgekit.quantize.codebook.learn import Gradient, Learning, choice_gradient, learn
from edgekit.quantize.codebook.output import OutputError
from edgekit.quantize.codebook.settle import settle
from edgekit.quantize.codebook.snap import snap
from edgekit.quantize.gptq import Inputs
from edgekit.quantize.schemes.codebook import IQ4_NL, Codebook
from edgekit.quantize.schemes.names import parse_scheme
from edgekit.quantize.storage import load_quantized, save_quantized
from edgekit.quantize.tensor import QuantizedTensor

SUMS = 1e-4
"""What a cost may be off by where it is summed in float32, in squared steps of the scale."""


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best_cost(values: list[float], weights: list[float], levels: int) -> float:
    """The least weighted squared error of any clustering: dynamic programming over sorted runs."""
    pairs = sorted(zip(values, weights, strict=True))

    def cost(start: int, end: int) -> float:
        mass = sum(w for _, w in pairs[start:end])
        mean = sum(x * w for x, w in pairs[start:end]) / mass
        return sum(w * (x - mean) ** 2 for x, w in pairs[start:end])

    best = [0.0] + [float("inf")] * len(pairs)
    for _ in range(levels):
        best = [
            min([best[end], *(best[start] + cost(start, end) for start in range(end))])
            for end in range(len(pairs) + 1)
        ]
    return best[-1]


def cost_of(values: Tensor, weights: Tensor, centres: Tensor) -> float:
    distances = (values.double()[:, None] - centres.double()).square().amin(1)
    return float((weights.double() * distances).sum())


def books(name: str) -> Codebook:
    scheme = parse_scheme(name)
    assert isinstance(scheme, Codebook)
    return scheme


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [2, 4, 8])
def test_kmeans_finds_the_optimum(seed: int, levels: int) -> None:
    values = torch.cat([draw(seed, 20), 5 + 0.3 * draw(seed + 9, 10)])
    weights = draw(seed + 20, 30).square() + 0.01
    for given in (torch.ones(30), weights):
        centres = kmeans(values, None if given is not weights else weights, levels)
        assert torch.equal(centres, centres.sort()[0])
        found = cost_of(values, given, centres)
        assert found == pytest.approx(best_cost(values.tolist(), given.tolist(), levels), rel=1e-5)


def test_kmeans_of_many_values_is_near_the_theory() -> None:
    """The optimal 8 levels of a Gaussian have an error of 0.03454 (Max 1960, table 1)."""
    values = draw(0, 200_000)
    centres = kmeans(values, None, 8)
    error = cost_of(values, torch.ones(len(values)), centres) / len(values)
    assert error == pytest.approx(0.03454, rel=0.01)
    assert centres[-1] == pytest.approx(2.152, abs=0.05)


def test_kmeans_with_few_values_and_with_weights_of_zero() -> None:
    assert kmeans(torch.tensor([2.0, 2.0, 1.0]), None, 4).tolist() == [1.0, 2.0, 2.0, 2.0]
    assert kmeans(torch.full((5,), 3.0), None, 8).tolist() == [3.0] * 8
    assert kmeans(torch.zeros(3), torch.zeros(3), 4).tolist() == [0.0] * 4
    far = kmeans(torch.tensor([0.0, 1.0, 1e4]), torch.tensor([1.0, 1.0, 0.0]), 2)
    assert bool(far.isfinite().all())


@pytest.mark.parametrize("name", ["cb2", "cb3", "cb4", "cb3g32", "cb3x4", "cb2g64x2", "cb4nl"])
def test_what_a_scheme_stores(name: str, tmp_path: Path) -> None:
    scheme = books(name)
    assert scheme.name == name
    weight = draw(1, 24, 128) * torch.linspace(0.5, 3, 24)[:, None]
    tensor = quantize_weight(scheme, weight)
    assert tensor.codebook is not None
    assert tensor.codebook_is_int8
    tables = tensor.codebook.reshape(scheme.books, -1)
    spread = tensor.scales.reshape(24, -1).repeat_interleave(scheme.group_size or 128, 1)
    for row in range(24):
        entries = tables[row * scheme.books // 24]
        assert torch.equal(entries, entries.sort()[0])
        expected = entries[tensor.codes[row].long()] * spread[row]
        assert torch.equal(tensor.dequantize()[row], expected)
    integers = tensor.as_int8()
    assert (integers.bits, integers.codes.dtype, integers.codebook) == (8, torch.int8, None)
    assert torch.equal(integers.dequantize(), tensor.dequantize())
    some = torch.tensor([5, 23, 0])
    assert torch.equal(tensor.rows(some).dequantize(), tensor.dequantize()[some])
    assert torch.equal(tensor.rows(slice(6, 17)).dequantize(), tensor.dequantize()[6:17])

    path = tmp_path / "q.safetensors"
    save_quantized(path, {"w": tensor})
    with safe_open(path, framework="pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
        assert file.get_tensor("w.codebook").dtype == torch.int8
    assert stored == tensor.nbytes == scheme.nbytes((24, 128))
    again = load_quantized(path)["w"]
    assert isinstance(again, QuantizedTensor)
    assert torch.equal(again.dequantize(), tensor.dequantize())


def test_entries_that_are_no_integers_are_stored_as_floats(tmp_path: Path) -> None:
    book = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    tensor = QuantizedTensor(codes, torch.ones(1), bits=2, axis=0, codebook=book)
    save_quantized(tmp_path / "q.safetensors", {"w": tensor})
    again = load_quantized(tmp_path / "q.safetensors")["w"]
    assert again.nbytes == 1 + 4 + 4 * 4
    with pytest.raises(ValueError, match="no int8"):
        tensor.as_int8()


def test_codebooks_beat_uniform_grids_and_more_of_what_costs_bits_helps() -> None:
    weight = draw(2, 64, 256)
    found = {
        name: sqnr_db(weight, quantize_weight(parse_scheme(name), weight))
        for name in ("w4", "cb4", "cb4g32", "cb3", "cb3g32", "cb2")
    }
    assert found["cb4"] > found["w4"] + 0.5
    assert found["cb4g32"] > found["cb4"] > found["cb3g32"] > found["cb3"] > found["cb2"] > 9


def test_the_table_of_ggml_is_kept_and_weights_follow_their_importance() -> None:
    weight, importance = draw(3, 8, 64), torch.ones(64)
    fitted = quantize_weight(parse_scheme("cb4nl"), weight)
    assert fitted.codebook is not None
    assert fitted.codebook.tolist() == list(IQ4_NL)
    importance[:4] = 1000.0
    plain = fit_codebooks(books("cb2"), weight)
    weighted = fit_codebooks(books("cb2"), weight, importance)
    errors = [(each.dequantize() - weight)[:, :4].square().mean() for each in (plain, weighted)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("weight", [torch.zeros(4, 32), torch.full((4, 32), 1e-9)])
def test_weights_that_are_nothing(weight: Tensor) -> None:
    for name in ("cb3", "cb3g32", "cb4nl"):
        assert float(quantize_weight(parse_scheme(name), weight).dequantize().abs().max()) <= 2**-13


def test_what_codebooks_refuse() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        fit_codebook(torch.ones(6, 32), 3, books=4)
    with pytest.raises(ValueError, match="infinities or NaN"):
        fit_codebook(torch.full((4, 32), torch.nan), 3)
    with pytest.raises(ValueError, match="for matrices"):
        fit_codebook(torch.ones(32), 3)


def test_snapping_keeps_the_largest_entry() -> None:
    tables = torch.tensor([[-2.0, 0.5, 1.0], [0.0, 0.0, 0.0]])
    entries, factors = snap(tables, torch.ones(2, 5))
    assert entries.tolist() == [[-127.0, 32.0, 64.0], [0.0, 0.0, 0.0]]
    assert factors.tolist() == pytest.approx([2 / 127, 1.0])


def test_small_weights_keep_their_precision() -> None:
    """Scales end at 2**-14: the codebook is made of smaller integers instead."""
    weight = 1e-3 * draw(14, 16, 256)
    large, small = (quantize_weight(parse_scheme("cb3"), each) for each in (1e3 * weight, weight))
    assert float(small.scales.min()) < 2**-13
    assert sqnr_db(weight, small) > sqnr_db(1e3 * weight, large) - 0.5


def test_nearest_is_nearest() -> None:
    book, values = draw(4, 8).sort()[0], draw(5, 1000)
    assert torch.equal(nearest(values, book).long(), (values[:, None] - book).abs().argmin(1))


def test_the_ordinary_gradient_is_that_of_the_softmax() -> None:
    logits = draw(6, 3, 40).requires_grad_()
    entries = draw(7, 3, 40).sort(0)[0]
    (torch.softmax(logits, 0) * entries).sum().backward()
    found = choice_gradient(torch.softmax(logits.detach(), 0), entries, Learning("ordinary"))
    assert logits.grad is not None
    torch.testing.assert_close(found, logits.grad)


def test_the_proximal_gradient_falls_with_the_distance() -> None:
    p = torch.tensor([0.2, 0.5, 0.3])[:, None]
    entries = torch.tensor([-1.0, 0.0, 3.0])[:, None]
    soft = -0.2 + 0.9  # sum of p times entry
    eps = 0.1 * 2.0  # of half the distance of the outer two
    found = choice_gradient(p, entries, Learning("proximal"))[:, 0].tolist()
    expected = [
        0.2 * -1 / (abs(-1 - soft) + eps),
        0.5 * -1 / (abs(0 - soft) + eps),
        0.3 * 1 / (abs(3 - soft) + eps),
    ]
    assert found == pytest.approx(expected)
    ordinary = choice_gradient(p, entries, Learning("ordinary"))[:, 0].tolist()
    assert abs(ordinary[2]) > abs(ordinary[1])
    assert abs(found[2]) < abs(found[1])


def test_weighted_kmeans_weighs_by_the_mean_square_of_each_columns_inputs() -> None:
    """Columns that are never seen take no part: here those of a hundredfold size."""
    weight, x = draw(15, 16, 64), draw(16, 300, 64)
    x[:, 32:] = 0
    weight[:, 32:] *= 100
    inputs, scheme = Inputs(64), books("cb3g32")
    inputs.add_inputs(x, x)
    found = weighted_kmeans(weight, inputs, scheme)
    alone = fit_codebooks(scheme, weight[:, :32], x[:, :32].square().mean(0))
    assert found.codebook is not None
    assert alone.codebook is not None
    torch.testing.assert_close(found.codebook, alone.codebook, atol=1, rtol=0)
    with pytest.raises(ValueError, match="expected inputs of 32 columns, got 64"):
        weighted_kmeans(weight[:, :32], inputs, scheme)


class Layer:
    """A linear layer whose inputs are correlated, as a model's are."""

    def __init__(self, rows: int = 48, columns: int = 64, seed: int = 0) -> None:
        mix = draw(seed, columns, columns) / columns**0.5 + torch.eye(columns)
        self.x = draw(seed + 1, 600, columns) @ mix
        self.weight = draw(seed + 2, rows, columns) / columns**0.5
        self.inputs = Inputs(columns)
        self.inputs.add_inputs(self.x, self.x)
        self.error = OutputError.of(self.weight, self.inputs)

    def loss(self, tensor: QuantizedTensor) -> float:
        out = self.x @ (tensor.dequantize() - self.weight).t()
        return float(out.square().sum() / (self.x @ self.weight.t()).square().sum())


def test_the_error_is_that_of_the_output() -> None:
    layer, candidate = Layer(), draw(9, 48, 64).double().requires_grad_()
    x, weight = layer.x.double(), layer.weight.double()
    damping = 0.01 * float(layer.inputs.hessian.diagonal().mean())
    direct = (x @ (candidate - weight).t()).square().sum() / len(x)
    direct = direct + damping * (candidate - weight).square().sum()
    direct.backward()
    assert candidate.grad is not None
    found = layer.error.gradient(candidate.detach().float())
    torch.testing.assert_close(2 * found.double(), candidate.grad, rtol=1e-3, atol=1e-4)
    zero = (x @ weight.t()).square().sum() / len(x) + damping * weight.square().sum()
    assert layer.error(candidate.detach().float()) == pytest.approx(
        float((direct - zero).detach()), rel=1e-3
    )


def test_what_is_owed_is_made_up_for() -> None:
    """A layer whose inputs strayed, and whose residual did, is to give what the float model has."""
    layer = Layer()
    strayed, owed = layer.x + 0.1 * draw(11, 600, 64), draw(12, 600, 48)
    wanted = layer.x @ layer.weight.t() + owed
    inputs = Inputs(64)
    inputs.add_outputs(strayed, wanted)
    error = OutputError.of(layer.weight, inputs)
    best = torch.linalg.solve(error.hessian, error.wanted.t()).t()

    def miss(weight: Tensor) -> float:
        return float((strayed @ weight.t() - wanted).square().sum())

    assert miss(best) < 0.99 * miss(layer.weight)
    assert error(best) < error(layer.weight)


@pytest.mark.parametrize("gradient", ["ordinary", "proximal"])
@pytest.mark.parametrize("name", ["cb3", "cb2g32x2"])
def test_each_step_lowers_the_error(gradient: Gradient, name: str) -> None:
    layer, scheme = Layer(), books(name)
    plain = fit_codebooks(scheme, layer.weight)
    start = fit_codebooks(scheme, layer.weight, layer.error.importance)
    learned = learn(layer.weight, start, layer.error, Learning(gradient))
    settled = settle(learned, layer.error, ROUNDS)
    losses = [layer.loss(each) for each in (plain, start, learned, settled)]
    assert losses[2] < 0.9 * losses[1]
    assert losses[3] < 0.9 * losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    for tensor in (learned, settled):
        assert tensor.codebook_is_int8
        assert tensor.nbytes == scheme.nbytes((48, 64))
    whole = jlcm(layer.weight, layer.inputs, scheme, Learning(gradient))
    assert torch.equal(whole.codes, settled.codes)
    assert torch.equal(whole.scales, settled.scales)


def test_descent_of_indices_never_raises_the_error_and_ends_where_no_neighbour_is_better() -> None:
    layer = Layer(rows=6, columns=16)
    tensor = fit_codebooks(books("cb4nl"), layer.weight.repeat(1, 2))
    inputs = Inputs(32)
    inputs.add_inputs(layer.x.repeat(1, 2) + draw(1, 600, 32), layer.x.repeat(1, 2))
    error = OutputError.of(layer.weight.repeat(1, 2), inputs)
    before = error(tensor.dequantize())
    for rounds in (1, 30):
        tensor = settle(tensor, error, rounds, fixed=True)
        after = error(tensor.dequantize())
        assert after < before
        before = after
    assert tensor.codebook is not None
    assert tensor.codebook.tolist() == list(IQ4_NL)
    spread = tensor.scales.repeat_interleave(32, 1)
    base = tensor.dequantize()
    for row, column, shift in itertools.product(range(6), range(32), (-1, 1)):
        index = int(tensor.codes[row, column]) + shift
        if 0 <= index < 16:
            changed = base.clone()
            changed[row, column] = tensor.codebook[index] * spread[row, column]
            assert error(changed) > after - 1e-4 * abs(after)


def test_a_sweep_over_columns_takes_for_each_the_best_neighbour_given_all_others() -> None:
    """Two blocks of columns and a part of one, by a float64 gradient made anew for every column.

    Every column is looked at behind the codes found for those before it: where two neighbours cost
    the same, either may be taken, and others may follow.
    """
    layer, scheme = Layer(rows=12, columns=320), books("cb3")
    start = fit_codebooks(scheme, layer.weight)
    assert start.codebook is not None
    book, scales = start.codebook.double(), start.scales.double()
    hessian, wanted = layer.error.hessian.double(), layer.error.wanted.double()
    found = settle(start, layer.error, 0, fixed=True).codes.long()
    codes = start.codes.long()
    for column in range(320):
        weight = book[codes] * scales[:, None]
        slope = weight @ hessian[:, column] - wanted[:, column]
        candidates = (codes[:, column] + torch.tensor([[-1], [0], [1]])).clamp(0, 7)
        change = book[candidates] * scales - weight[:, column]
        costs = change.square() * hessian[column, column] + 2 * change * slope
        taken = candidates == found[:, column]
        assert taken.any(0).all()
        codes[:, column] = found[:, column]
        lost = costs.masked_fill(~taken, torch.inf).amin(0) - costs.amin(0)
        assert float((lost / hessian[column, column]).max()) < SUMS * float(scales.max()) ** 2
    assert (codes != start.codes).double().mean() > 0.1


@pytest.mark.parametrize("rounds", [0, ROUNDS])
def test_a_fixed_table_stays_as_it_is_for_weights_however_small(rounds: int) -> None:
    layer = Layer(rows=32)
    found = jlcm(1e-3 * layer.weight, layer.inputs, books("cb4nl"), rounds=rounds)
    assert found.codebook is not None
    assert found.codebook.tolist() == list(IQ4_NL)
    assert int(found.codes.max()) < 16


def test_inputs_that_were_never_seen_change_nothing() -> None:
    inputs = Inputs(32)
    inputs.add_inputs(torch.zeros(4, 32), torch.zeros(4, 32))
    weight = draw(13, 8, 32)
    found = jlcm(weight, inputs, books("cb4"))
    assert sqnr_db(weight, found) > 15
    with pytest.raises(ValueError, match="saw no inputs"):
        jlcm(weight, Inputs(32), books("cb4"))
    narrow = Inputs(16)
    narrow.add_inputs(draw(1, 4, 16), draw(1, 4, 16))
    with pytest.raises(ValueError, match="expected inputs of 32 columns"):
        jlcm(weight, narrow, books("cb4"))


def test_rows_of_the_benchmark_are_of_methods_that_a_scheme_has() -> None:
    assert wanted(["w4", "rtn:w8"]) == ["rtn:w4", "mse:w4", "gptq:w4", "rtn:w8"]
    assert wanted(["cb3"])[-1] == "jlcm:cb3"
    with pytest.raises(SystemExit, match="kmeans:w4: methods of w4 are rtn, mse, gptq"):
        wanted(["kmeans:w4"])


def test_like_rows_are_gathered() -> None:
    """Gaussian, uniform and two-valued rows, shuffled; the order finds them again."""
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    uniform = torch.rand(20, 400, generator=torch.Generator().manual_seed(4)) - 0.5
    rows = torch.cat([draw(5, 20, 400), uniform, draw(6, 20, 400).sign() + 0.01])
    found = group_order([rows[order]], 3)
    assert sorted(found.tolist()) == list(range(60))
    kinds = (order[found] // 20).view(3, 20)
    assert all(len(set(kind.tolist())) == 1 for kind in kinds)
    with pytest.raises(ValueError, match="do not divide"):
        group_order([rows], 7)


def test_clusters_are_balanced() -> None:
    points = torch.cat([draw(7, 50, 2), 9 + draw(8, 14, 2)])
    counts = balanced_clusters(points, 4).bincount()
    assert counts.tolist() == [16] * 4
