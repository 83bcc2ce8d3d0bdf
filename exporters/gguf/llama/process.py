"""llama.cpp's quantizer in a process of its own, which `llama_quantize` starts.

`main` reads one JSON job (`llama_quantize._run`) from stdin, passes llama.cpp's log to stdout and
ends with 0, or with 1 where llama.cpp refused. `llama_model_quantize` cannot be interrupted, ends
the process where one of its assertions fails, and its memory is gone with the process.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import llama_cpp

from edgekit.exporters.gguf.llama.imatrix import Imatrix

_LONGEST_TEXT = 127  # llama_model_kv_override.val_str, less its final 0; longer ones are cut
_SLAB_BYTES = 128 << 20  # of a tensor in memory at a time; the bytes written do not depend on it
_INT, _STR = 0, 3  # llama_model_kv_override_type


def main() -> None:
    """Do the job on stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it ends this process
    job = json.load(sys.stdin)
    llama_cpp.llama_log_set(_pass_on, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = job["file_type"]
    parameters.nthread = job["threads"]
    parameters.dry_run = job["dry_run"]
    parameters.max_buf_size = _SLAB_BYTES
    kept = None if job["imatrix"] is None else _set_imatrix(parameters, Path(job["imatrix"]))
    source, output = os.fsencode(job["source"]), os.fsencode(job["output"])
    status = llama_cpp.llama_model_quantize(source, output, ctypes.byref(parameters))
    del kept
    sys.exit(status)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _pass_on(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    try:
        os.write(1, text)
    except OSError:  # the parent is gone, and with it whoever wanted the file
        os._exit(1)


def _set_imatrix(parameters: Any, path: Path) -> object:  # noqa: ANN401 - a ctypes structure
    """Give the parameters what `llama-quantize --imatrix` gives them (tools/quantize/quantize.cpp).

    Returns what must stay alive as long as they.
    """
    imatrix = Imatrix.load(path)
    means = {name: entry.means() for name, entry in imatrix.entries.items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(means) + 1))()  # the last one is empty
    for entry, (name, values) in zip(entries, means.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    texts: dict[str, str | int] = {"quantize.imatrix.file": path.name}
    if imatrix.datasets:
        texts["quantize.imatrix.dataset"] = imatrix.datasets[0]
    texts["quantize.imatrix.entries_count"] = len(means)
    if imatrix.chunk_count > 0:
        texts["quantize.imatrix.chunks_count"] = imatrix.chunk_count
    overrides = (llama_cpp.llama_model_kv_override * (len(texts) + 1))()
    for override, (key, value) in zip(overrides, texts.items(), strict=False):
        override.key = key.encode()
        if isinstance(value, int):
            override.tag, override.value.val_i64 = _INT, value
        else:
            override.tag, override.value.val_str = _STR, _cut(value)
    parameters.imatrix, parameters.kv_overrides = entries, overrides
    return means, entries, overrides


def _cut(text: str) -> bytes:
    """Cut between letters: llama-quantize cuts between bytes, and readers choke on halves."""
    return text.encode()[:_LONGEST_TEXT].decode(errors="ignore").encode()
