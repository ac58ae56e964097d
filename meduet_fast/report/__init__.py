"""The report of a pretraining run that a person looks at."""

from .write import read_numbers, write_report

__all__ = ["read_numbers", "write_report"]
