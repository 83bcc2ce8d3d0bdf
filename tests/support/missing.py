"""What edgekit does where a library is not installed."""

import sys

import pytest


def uninstall(patch: pytest.MonkeyPatch, library: str, *users: str) -> None:
    """As if `library` were not installed: what is under `users` imports anew, until undone.

    A module is known twice, by `sys.modules` and as an attribute of its package: both come back,
    else the tests after this one would meet two copies of it.
    """
    for name, module in [*sys.modules.items()]:
        if any(name == user or name.startswith(f"{user}.") for user in (library, *users)):
            patch.delitem(sys.modules, name)
            package, _, leaf = name.rpartition(".")
            if getattr(sys.modules.get(package), leaf, None) is module:
                patch.setattr(sys.modules[package], leaf, module)
    patch.setitem(sys.modules, library, None)
