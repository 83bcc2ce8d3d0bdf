"""How a process that we started ended, in words for a user."""

import signal

_LONGEST_QUOTE = 200


def how_it_ended(status: int) -> str:
    """Return a process's end in words: `subprocess` gives a signal as a negative number."""
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:  # a real-time signal, which has no name
        return f"signal {-status}"


def last_line(text: str) -> str:
    """Return the last line of a text that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def quoted(said: str) -> str:
    """Return the end of what a library said, to go on from how it ended; nothing for nothing."""
    return f": {said[-_LONGEST_QUOTE:]}" if said else ""
