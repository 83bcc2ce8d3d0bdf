"""Memory that was freed, given back to the system."""

import ctypes


def trim_heap() -> None:
    """Give freed memory back; without glibc it stays with the process.

    glibc keeps what lies below anything still in use, a gigabyte of codes for one small tensor.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
