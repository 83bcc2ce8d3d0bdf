"""Reading /proc and /sys of a host; what cannot be read is None, never a guess."""

from collections.abc import Iterable

from edgekit.devices.hosts.host import Host

CPU_FOLDER = "/sys/devices/system/cpu"


def read_text(host: Host, path: str) -> str | None:
    """Return the file's text without outer blanks and NULs; None if missing or unreadable.

    Kernel files fail in many ways besides being absent (EACCES on Android, EINVAL or ENODATA from
    a sensor that is switched off), and an empty one says nothing either.
    """
    found = host.read(path)
    return None if found is None else found.decode(errors="replace").strip("\0\n\t ") or None


def read_int(host: Host, path: str) -> int | None:
    """Return the file's one decimal number; None if there is none."""
    text = read_text(host, path)
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def read_scaled(host: Host, path: str, divisor: float) -> float | None:
    """Return the file's number over `divisor` (kHz to MHz, millidegrees to degrees)."""
    number = read_int(host, path)
    return None if number is None else number / divisor


def list_folder(host: Host, path: str, prefix: str) -> list[str]:
    """Return the entries of a folder that are `prefix` and a number, in the number's order."""
    numbered = [
        n for n in host.entries(path) if n.startswith(prefix) and n[len(prefix) :].isdigit()
    ]
    return sorted(numbered, key=lambda name: int(name[len(prefix) :]))


def key_values(lines: Iterable[str], separator: str = ":") -> dict[str, str]:
    """Read `key: value` lines; the first of two equal keys is kept."""
    pairs: dict[str, str] = {}
    for line in lines:
        key, found, value = line.partition(separator)
        if found:
            pairs.setdefault(key.strip(), value.strip())
    return pairs


def meminfo_bytes(host: Host) -> dict[str, int]:
    """Return the entries of /proc/meminfo that are given in kB (1024 bytes), as bytes."""
    pairs = key_values((read_text(host, "/proc/meminfo") or "").splitlines())
    numbers = {key: value.split() for key, value in pairs.items()}
    return {
        key: int(words[0]) * 1024
        for key, words in numbers.items()
        if len(words) == 2 and words[0].isdigit() and words[1] == "kB"
    }
