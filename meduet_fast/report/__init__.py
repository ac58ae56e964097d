"""The report of a pretraining run that a person looks at."""

from meduet_fast.errors import needs_extra

with needs_extra("train"):
    from .write import read_numbers, write_report

__all__ = ["read_numbers", "write_report"]
