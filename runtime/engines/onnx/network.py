"""Runs an exported module in onnxruntime."""

from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from edgekit.devices.cpus import default_threads
from edgekit.errors import EdgekitError, one_line
from edgekit.formats.onnx.file import OnnxFile
from edgekit.runtime.engines.network_engine import Array, OneNetworkEngine
from edgekit.runtime.engines.onnx.decoder import open_session


class OnnxModule(OneNetworkEngine):
    """An `.onnx` whose inputs and outputs are tensors."""

    name = "onnx"
    version = ort.__version__

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Check and load a file."""
        super().__init__()
        OnnxFile.open(path)
        self.threads = threads or default_threads()
        self._session: ort.InferenceSession | None = open_session(
            path, self.threads, exact_bytes=True
        )
        self._inputs = [item.name for item in self._session.get_inputs()]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the module on its inputs, in order."""
        assert self._session is not None
        if len(inputs) != len(self._inputs):
            raise EdgekitError(f"the module takes {len(self._inputs)} inputs, got {len(inputs)}")
        try:
            feed = dict(zip(self._inputs, self._laid_out(inputs), strict=True))
            return [*self._session.run(None, feed)]
        except Exception as error:  # the exceptions of onnxruntime share no other base
            raise EdgekitError(f"onnxruntime failed on the module: {one_line(error)}") from error

    def close(self) -> None:
        """Release the module."""
        self._session = None


def open_module(path: Path, threads: int | None) -> OnnxModule:
    """Open an `.onnx` file."""
    return OnnxModule(path, threads)
