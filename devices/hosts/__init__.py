"""Machines as a parameter: `host.py` says what is asked of one, `local.py` is this one."""
