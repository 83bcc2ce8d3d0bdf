"""The CIFAR-10 benchmark: its reader, its training loop, and its nets in both engines."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.cifar import data, table, train
from benchmarks.cifar.data import CLASSES, Cifar, Split
from benchmarks.cifar.nets import IMAGE, make_net
from edgekit.errors import EdgekitError

DATA = Path(__file__).parents[3] / "shared/data/cifar10/cifar10-jpg.zip"
WIDTH = 0.25


def _pictures(count: int, seed: int = 0) -> Split:
    """Smooth random pictures, whose class is a function of their colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    colours = torch.randint(256, (10, 3), generator=torch.Generator().manual_seed(99))
    noise = torch.randint(-40, 41, (count, *IMAGE), generator=generator)
    images = colours[labels].view(count, 3, 1, 1) + noise
    return Split(images.clamp(0, 255).to(torch.uint8), labels)


@pytest.fixture(scope="module")
def tiny() -> Cifar:
    return Cifar(_pictures(2 * train.BATCH), _pictures(100, seed=1))


def _jpeg(pixels: NDArray[np.uint8], kind: str = "JPEG") -> bytes:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow, which reads the JPEGs")
    written = io.BytesIO()
    image.fromarray(pixels).save(written, kind)
    return written.getvalue()


def _zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


def test_the_reader_gives_pixels_and_labels(tmp_path: Path) -> None:
    plain = {
        name: np.full((32, 32, 3), colour, np.uint8)
        for name, colour in {
            "train/truck/0000.jpg": (250, 20, 20),
            "train/cat/0001.jpg": (10, 240, 10),
            "train/cat/0000.jpg": (10, 10, 240),
            "test/airplane/0000.jpg": (99, 99, 99),
        }.items()
    }
    archive = _zip(tmp_path / "a.zip", {name: _jpeg(pixels) for name, pixels in plain.items()})
    found = data.load(archive, tmp_path / "cache")
    assert found.train.labels.tolist() == [3, 3, 9]
    assert found.test.labels.tolist() == [0]
    assert found.train.images.shape == (3, 3, 32, 32)
    for picture, name in zip(found.train.images, sorted(plain)[1:], strict=True):
        expected = torch.from_numpy(plain[name]).permute(2, 0, 1)
        assert (picture.int() - expected.int()).abs().max() <= 4  # JPEG is lossy
    archive_again = archive.rename(tmp_path / "b.zip")  # found by its content
    cached = sorted((tmp_path / "cache").iterdir())
    before = [path.stat().st_mtime_ns for path in cached]
    again = data.load(archive_again, tmp_path / "cache")
    assert torch.equal(again.train.images, found.train.images)
    assert [path.stat().st_mtime_ns for path in cached] == before


def test_the_reader_refuses_what_is_no_such_zip(tmp_path: Path) -> None:
    small = _jpeg(np.zeros((16, 16, 3), np.uint8))
    right = _jpeg(np.zeros((32, 32, 3), np.uint8))
    for files, said in [
        ({"train/cow/0.jpg": right}, "'cow' is none of CIFAR-10's classes"),
        ({"train/cat/0.jpg": small}, "not 32 x 32"),
        ({"train/cat/0.jpg": right[:100]}, "train/cat/0.jpg: is no readable JPEG"),
        ({"train/cat/0.jpg": right}, "holds no test/CLASS/NAME.jpg"),
        ({"readme": b""}, "holds no train/CLASS/NAME.jpg"),
    ]:
        with pytest.raises(EdgekitError, match=said):
            data.load(_zip(tmp_path / "a.zip", files), tmp_path / "cache")
    (tmp_path / "a.zip").write_bytes(b"PK no")
    with pytest.raises(EdgekitError, match="is no readable zip"):
        data.load(tmp_path / "a.zip", tmp_path / "cache")
    with pytest.raises(EdgekitError, match="cannot be read"):
        data.load(tmp_path / "none.zip", tmp_path / "cache")


def test_the_shared_data_is_whole(tmp_path: Path) -> None:
    if not DATA.exists():
        pytest.skip("needs ../shared/data/cifar10/cifar10-jpg.zip")
    pytest.importorskip("PIL", reason="needs Pillow, which reads the JPEGs")
    found = data.load(DATA, tmp_path)
    assert torch.bincount(found.train.labels).tolist() == [2500] * 10
    assert torch.bincount(found.test.labels).tolist() == [1000] * 10
    assert len(CLASSES) == 10
    pixels = data.normalise(found.train.images)
    assert pixels.mean((0, 2, 3)).abs().max() < 0.05
    assert (pixels.std((0, 2, 3)) - 1).abs().max() < 0.05


def test_augmentation_shifts_and_mirrors(tiny: Cifar) -> None:
    first, second = (list(train.augmented(tiny.train, 0, epoch)) for epoch in (0, 1))
    assert [len(labels) for _, labels in first] == [train.BATCH] * 2
    again = list(train.augmented(tiny.train, 0, 0))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][1], second[0][1])
    padded = torch.nn.functional.pad(tiny.train.images, [train.PAD] * 4)
    mirrored = 0
    for picture, label in zip(first[0][0][:20], first[0][1], strict=False):
        matches = [
            (int(tiny.train.labels[number]), flip)
            for flip in (False, True)
            for number in _sources(padded, picture.flip(2) if flip else picture)
        ]
        assert len(matches) == 1
        assert matches[0][0] == label
        mirrored += matches[0][1]
    assert 3 <= mirrored <= 17


def _sources(padded: Tensor, crop: Tensor) -> list[int]:
    """Return which padded pictures hold a normalised crop; the middle is compared first."""
    found = []
    normalised = data.normalise(padded)
    middle = crop[:, 12, 12]
    corner = normalised[:, :, 12 : 12 + 9, 12 : 12 + 9]
    for number, top, left in (corner == middle.view(1, 3, 1, 1)).all(1).nonzero().tolist():
        if torch.equal(normalised[number, :, top : top + 32, left : left + 32], crop):
            found.append(number)
    return found


def test_a_killed_training_goes_on_where_it_was(
    tiny: Cifar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = train.Training(epochs=2, width=WIDTH)
    whole = train.train("mobilenet", training, tiny, _made(tmp_path / "whole"))
    epoch = train._epoch

    def killed(*arguments: object) -> float:
        if arguments[-1] == 1:
            raise KeyboardInterrupt
        return epoch(*arguments)  # type: ignore[arg-type]

    halved = _made(tmp_path / "halved")
    monkeypatch.setattr(train, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        train.train("mobilenet", training, tiny, halved)
    monkeypatch.undo()
    with pytest.raises(EdgekitError, match="is of other settings"):
        train.train("mobilenet", train.Training(epochs=3, width=WIDTH), tiny, halved)
    resumed = train.train("mobilenet", training, tiny, halved)
    for (name, value), other in zip(
        whole.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    assert [path.name for path in halved.iterdir()] == ["mobilenet.safetensors"]
    read = train.load_net(halved / "mobilenet.safetensors")
    assert train.accuracy(read, tiny.test) == train.accuracy(whole, tiny.test)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "row", "held"),
    [
        pytest.param("mobilenet", "w8a8", ("executorch", "onnx"), marks=pytest.mark.slow),
        ("resnet", "w8a8", ("executorch", "onnx")),
        pytest.param("mobilenet", "qat-w4a8", ("executorch", "onnx"), marks=pytest.mark.slow),
        ("mobilenet", "w8a8-tensor-affine", ("onnx",)),
        ("resnet", "w8a8-affine", ()),
    ],
)
def test_a_row_of_the_table_is_equal_in_torch_and_in_the_engines(
    name: str, row: str, held: tuple[str, ...], tiny: Cifar, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = make_net(name, WIDTH)
    with torch.no_grad():
        for images, _ in tiny.train.batches(64):
            net(images)  # batch norms see data
    network = table.quantize(net.eval(), table.ROWS[row], tiny)
    found = table.measure(network, row, table.ROWS[row], tiny, tmp_path)
    for target in table.TARGETS:
        if target in held:
            assert abs(found[target] - found["torch"]) <= 0.03
        else:
            assert f"target {target} cannot hold {row}" in found[target]
    printed = table.table({row: found})
    assert printed.count("cannot hold it") == 2 - len(held)
    assert f"{found['torch']:.2%}" in printed
