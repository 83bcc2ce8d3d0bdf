"""Keeps what libraries print about themselves away from the user."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from edgekit.common.last_words import hidden_output

_CHATTY = ("torchao", "torch.utils._pytree", "root")


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide what torch, torchao and ExecuTorch say while they are imported, native code included.

    What was said is printed after all where the import fails.
    """
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|torchao|executorch")
    if sys.stderr is None:  # closed by the caller: nothing is shown anyway
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with hidden_output() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stderr.flush()
            said.seek(0)
            os.write(saved, said.read().encode())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
