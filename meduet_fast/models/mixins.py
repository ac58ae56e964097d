"""Take diffusers' base classes of networks, without the noise of its import."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from meduet_fast.errors import needs_extra


@contextmanager
def quiet() -> Iterator[None]:
    """Silence loggers: diffusers imports what it finds, and packages for other machines complain."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


with needs_extra("synthesis"), quiet():
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

__all__ = ["ConfigMixin", "ModelMixin", "quiet", "register_to_config"]
