"""How fast this machine can read memory: the limit of decoding, which reads all weights per token.

Three read-only kernels take turns and the fastest pass of any of them is the answer, because
which one comes nearest to the hardware differs by machine and C library: the library's `memchr`
(one stream) and `memcmp` (two streams), hand-vectorised in glibc and bionic for x86 and ARM, and
numpy's float32 maximum (SIMD everywhere, also where the C library's functions go byte by byte).
All three release the GIL, so plain threads read at once. In trials on a 2-core AVX-512 machine a
C loop of four vector accumulators was no faster than the best of them, and numpy's sum and dot
were no faster than its maximum.

Where other programs use the machine, what is left to this one is measured: a lower bound.
"""

import ctypes
import mmap
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Barrier
from typing import Any

from edgekit.devices.cpus import usable_cpus
from edgekit.devices.probe.machine import Machine, probe
from edgekit.errors import EdgekitError

MAX_BUFFER_BYTES = 512 * 1024**2
MIN_BUFFER_BYTES = 64 * 1024**2  # where the caches cannot be read
CACHE_MULTIPLE = 4  # then at most a quarter of a pass can come out of the cache
_SLICE_ALIGNMENT = 128  # two halves of whole cache lines
_FILL = 1
_ABSENT = 0  # what memchr looks for and never finds

Kernel = Callable[[int, int], object]  # reads (address, bytes) once; the result depends on all


@dataclass(frozen=True)
class ReadBandwidth:
    """A measurement: best GB/s (1e9 bytes), and the nanoseconds of every pass by kernel."""

    gb_per_s: float
    kernel: str
    threads: int
    buffer_bytes: int
    samples_ns: dict[str, tuple[int, ...]]

    @property
    def median_gb_per_s(self) -> float:
        """Return the median pass of the fastest kernel: far below the best on a busy machine."""
        return self.buffer_bytes / statistics.median(self.samples_ns[self.kernel])

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as JSON's types."""
        return {**asdict(self), "median_gb_per_s": self.median_gb_per_s}


def measure_read_bandwidth(
    threads: int | None = None, passes: int = 8, buffer_bytes: int | None = None
) -> ReadBandwidth:
    """Measure in this process, with `threads` readers: by default the CPUs it can keep busy.

    Every kernel reads the whole buffer `passes` times; `buffer_bytes` defaults to
    `choose_buffer_bytes` of the probed machine. Takes well under a second on an idle PC. Raises
    `EdgekitError` for counts below 1 and where memory for a fair buffer is lacking.
    """
    threads = usable_cpus() if threads is None else threads
    if threads < 1 or passes < 1:
        raise EdgekitError(f"threads and passes must be at least 1: {threads} and {passes}")
    size = choose_buffer_bytes(probe()) if buffer_bytes is None else buffer_bytes
    size -= size % (threads * _SLICE_ALIGNMENT)  # so that every byte is read by one thread
    if size <= 0:
        raise EdgekitError(f"a buffer of {buffer_bytes} bytes is too small for {threads} threads")
    with mmap.mmap(-1, size) as buffer:
        _fill(buffer, size)
        samples = _time_passes(buffer, _kernels(), threads, passes)
    kernel = min(samples, key=lambda name: min(samples[name]))
    return ReadBandwidth(size / min(samples[kernel]), kernel, threads, size, samples)


def choose_buffer_bytes(machine: Machine) -> int:
    """Return a size far beyond the caches: 4x the last level, 64 to 512 MiB, <= RAM free / 4.

    Raises `EdgekitError` when that quarter is smaller than the last-level cache itself, since
    the cache would then be measured.
    """
    cache = machine.last_level_cache_bytes or 0
    size = min(max(CACHE_MULTIPLE * cache, MIN_BUFFER_BYTES), MAX_BUFFER_BYTES)
    available = machine.conditions.ram_available_bytes
    size = size if available is None else min(size, available // 4)
    if size <= max(cache, mmap.PAGESIZE):
        raise EdgekitError(
            f"cannot measure read bandwidth: a quarter of the available RAM ({size} bytes) is not "
            f"above the last-level cache ({cache} bytes); free some memory"
        )
    return size


def _fill(buffer: mmap.mmap, size: int) -> None:
    """Write every page: unwritten ones all map to one zero page, which would sit in the cache.

    Huge pages where the kernel grants them, so that TLB misses do not hide the memory's speed.
    """
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them measures with small pages
            buffer.madvise(mmap.MADV_HUGEPAGE)
    ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(buffer)), _FILL, size)


def _kernels() -> dict[str, Kernel]:
    import numpy as np

    libc = ctypes.CDLL(None)
    libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.memchr.restype = ctypes.c_void_p
    libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def memchr(address: int, size: int) -> object:
        return libc.memchr(address, _ABSENT, size)

    def memcmp(address: int, size: int) -> object:
        return libc.memcmp(address, address + size // 2, size // 2)

    def numpy_max(address: int, size: int) -> object:
        floats = (ctypes.c_float * (size // 4)).from_address(address)
        return np.max(np.ctypeslib.as_array(floats))

    return {"memchr": memchr, "memcmp": memcmp, "numpy max": numpy_max}


def _time_passes(
    buffer: mmap.mmap, kernels: dict[str, Kernel], threads: int, passes: int
) -> dict[str, tuple[int, ...]]:
    """Time whole-buffer reads, the kernels in turn so that a slow moment hits all alike."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    share = len(buffer) // threads
    slices = [(address + i * share, share) for i in range(threads)]
    samples: dict[str, list[int]] = {name: [] for name in kernels}
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            for name, kernel in kernels.items():
                samples[name].append(_time_pass(pool, kernel, slices))
    return {name: tuple(times) for name, times in samples.items()}


def _time_pass(pool: ThreadPoolExecutor, kernel: Kernel, slices: list[tuple[int, int]]) -> int:
    """Return the nanoseconds from the common start to the last thread's end."""
    start = Barrier(len(slices))

    def read(part: tuple[int, int]) -> tuple[int, int]:
        start.wait()
        began = time.perf_counter_ns()
        kernel(*part)
        return began, time.perf_counter_ns()

    spans = list(pool.map(read, slices))
    return max(end for _, end in spans) - min(began for began, _ in spans)
