"""Sizes of memory and files as people write them."""

import math
import re

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(
    r"(?P<number>[0-9]{1,15}|[0-9]{1,3}(?:_[0-9]{3}){1,5}|[0-9]{0,15}\.[0-9]{1,15})"
    r"\s*(?P<power>[KMGT]?)(?P<binary>i?)(?P<bytes>B?)",
    re.IGNORECASE | re.ASCII,
)


def parse_size(text: str, unit: str = "") -> int | None:
    """Return the bytes of `4M`, `4 MB`, `4MiB`, `1.2gb` or `4_000_000`; None for what is no size.

    M and MB are 1e6 bytes, Mi and MiB 2^20, as the standards have it; B is a byte. A number alone
    is of `unit`: with `unit="GiB"` 8 is 8 GiB, and so are 8G and 8GB, for memory is sold by powers
    of two.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match["binary"] and not match["power"]):
        return None
    binary = bool(match["binary"]) or unit.endswith("iB")
    bare = not match["power"] and not match["bytes"]
    power = _POWERS[unit[:1] if bare else match["power"].upper()]
    bytes_ = float(match["number"].replace("_", "")) * (1024 if binary else 1000) ** power
    return int(bytes_) if 1 <= bytes_ < math.ldexp(1, 60) else None
