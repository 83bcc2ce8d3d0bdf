"""Words of messages and tables that more than one of them needs."""


def counted(number: int, thing: str, things: str | None = None) -> str:
    """Return a number with its thing: `1 chunk`, `2 chunks`, `1 matrix`, `2,000 matrices`."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
