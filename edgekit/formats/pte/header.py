"""The first bytes of a `.pte`: what it is, and how long it must be to be whole.

Header: `_ExtendedHeader` in executorch/exir/_serialize/_program.py.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError

_HEAD_BYTES = 40
_SIZES_PLACE = 12  # uint32 length of the header, then uint64 program, segment base, segments
SEGMENTS_SIZE_PLACE = _SIZES_PLACE + struct.calcsize("<IQQ")


@dataclass(frozen=True)
class PteHeader:
    """Sizes in bytes: of the file, of the program that begins it; where its segments begin.

    `complete` is False where the file does not state all of them (one without segments, or of an
    old ExecuTorch): then a cut at its end goes unnoticed here.
    """

    file_bytes: int
    program_bytes: int
    segment_base: int
    complete: bool

    @classmethod
    def read(cls, path: Path) -> "PteHeader":
        """Read a file's header; EdgekitError for a foreign file and a truncated one."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(_HEAD_BYTES)
        except OSError as error:
            raise EdgekitError(f"{path}: cannot be read: {error.strerror}") from error
        if head[4:6] != b"ET":
            raise EdgekitError(f"{path}: is not an ExecuTorch program (no 'ET12' mark)")
        if head[4:8] != b"ET12":
            mark = head[4:8].decode("ascii", errors="replace")
            raise EdgekitError(f"{path}: has the ExecuTorch format {mark!r}, not 'ET12'")
        if head[8:12] != b"eh00" or len(head) < _HEAD_BYTES:
            return cls(size, size, 0, complete=False)
        length, program, base, data = struct.unpack_from("<IQQQ", head, _SIZES_PLACE)
        complete = length >= 32  # an older header ends before the size of the segments
        end = max(program, base + (data if complete else 0))
        if size < end:
            raise EdgekitError(f"{path}: is truncated: {size} bytes, its header says {end}")
        return cls(size, program, base, complete)
