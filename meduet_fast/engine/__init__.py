"""Train any :class:`Task`; nothing here knows a model, an objective or a kind of data."""

from meduet_fast.errors import needs_extra

with needs_extra("train"):
    from .config import AdamWConfig, EngineConfig
    from .loop import FitResult, fit
    from .task import Batch, Batches, Task

__all__ = ["AdamWConfig", "Batch", "Batches", "EngineConfig", "FitResult", "Task", "fit"]
