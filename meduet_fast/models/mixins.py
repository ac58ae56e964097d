"""Import diffusers: without its warnings, and with a word for those who do not have it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from meduet_fast.errors import needs_extra


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep imports of diffusers within from logging what it misses or finds.

    Raises:
        MissingExtra: if it is not installed.
    """
    before = logging.root.manager.disable
    logging.disable()
    try:
        with needs_extra("synthesis"):
            yield
    finally:
        logging.disable(before)
