"""Readiness checks before a repetition: recorded and shown, never waited for, never hidden."""

from edgekit.devices.probe.conditions import Conditions
from edgekit.runtime.bench.record import Gate

# A Raspberry Pi 5 lowers its clock at 80 C (its documentation's soft limit); phones do earlier.
_HOTTEST_CELSIUS = 80.0


def check_gates(start: Conditions, now: Conditions) -> tuple[Gate, ...]:
    """Compare the present conditions with the limits and with those at the start of the call."""
    return (_temperature(now), _swap(start, now))


def _temperature(now: Conditions) -> Gate:
    hottest = max((sensor.celsius for sensor in now.temperatures), default=None)
    return Gate(
        name="temperature",
        value=hottest,
        limit=f"below {_HOTTEST_CELSIUS:.0f} C",
        passed=None if hottest is None else hottest < _HOTTEST_CELSIUS,
    )


def _swap(start: Conditions, now: Conditions) -> Gate:
    """Memory swapped out before the call is idle; swapping during it costs time."""
    if start.swap_used_bytes is None or now.swap_used_bytes is None:
        return Gate("swap_growth_bytes", None, "at most 0", None)
    growth = now.swap_used_bytes - start.swap_used_bytes
    return Gate("swap_growth_bytes", growth, "at most 0", growth <= 0)
