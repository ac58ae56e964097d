"""Check a configuration where it is given: its numbers, what is left empty, and what YAML makes of a file."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from .errors import UserError


class SettingError(UserError, ValueError):
    """A setting that is out of its range.

    Attributes:
        name: the field of the configuration, with which the message begins.
    """

    def __init__(self, name: str, message: str) -> None:
        self.name = name
        super().__init__(f"{name}: {message}")


@dataclass(frozen=True)
class Range:
    """A range of finite numbers, from ``low`` to ``high``.

    Attributes:
        low, high: its ends; an infinite one is no end.
        above, below: whether the end itself is left out.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        """Tell whether a number is in it."""
        low = self.low < value if self.above else self.low <= value
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        return f"{self.low:g} {'<' if self.above else '<='} value {'<' if self.below else '<='} {self.high}"


POSITIVE = Range(0, above=True)
FROM_0, FROM_1 = Range(0), Range(1)
SHARE = Range(0, 1, below=True)  # of a whole, which is left out
SEED = Range(0, 2**64 - 1)


def check_numbers(settings: Any, allowed: Range, *names: str) -> None:
    """Refuse numbers of a dataclass that are out of a range, not finite, or no numbers.

    Whole numbers are those whose type says ``int``; None is for those whose type does. Of a sequence every
    item is looked at.

    Raises:
        SettingError: ``name: found ..., expected ...``.
    """
    hints = get_type_hints(type(settings))
    for name in names:
        value, hint = getattr(settings, name), hints[name]
        kinds = get_args(hint) or (hint,)
        if value is None and type(None) in kinds:
            continue
        kind = Integral if int in kinds else Real
        items: Sequence[Any] = value if isinstance(value, (tuple, list)) else [value]
        for item in items:
            number = isinstance(item, kind) and not isinstance(item, bool)
            if not (number and abs(item) <= sys.float_info.max and allowed.holds(item)):
                what = "a whole number, " if kind is Integral and not isinstance(item, Integral) else ""
                off = ", or null for none" if type(None) in kinds else ""
                found = "nothing" if value is None else str(value).removesuffix(".0")  # as typed
                raise SettingError(name, f"found {found}, expected {what}{allowed}{off}")


def check_given(settings: Any, prefix: str = "") -> None:
    """Refuse None where a dataclass, or one in it, has no place for it.

    Raises:
        SettingError: naming the field, from the outermost on.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if value is None and type(None) not in get_args(hint):
            raise SettingError(prefix + name, "found nothing, expected a value")
        if is_dataclass(value):
            check_given(value, f"{prefix}{name}.")


def check_yaml(path: Path) -> None:
    """Refuse a file of settings that is no YAML, or in which YAML would read what nobody meant.

    Such are a key given twice, of which the last would count, and numbers in the bases 8 and 60: 010 is 8,
    1:30 is 90.

    Raises:
        UserError: naming the file, and the line.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: expected settings, one to a line, as in `steps: 100`")
        _check_node(path, root)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: settings that are nested too deeply, or contain themselves") from error


def _check_node(path: Path, node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{path}: line {key.start_mark.line + 1}: expected a name before the colon")
            if key.value in keys:
                raise UserError(f"{path}: line {key.start_mark.line + 1}: {key.value} is given twice")
            if isinstance(value, yaml.MappingNode) and not value.value:
                raise UserError(f"{path}: line {key.start_mark.line + 1}: {key.value} is empty")
            keys.add(key.value)
            _check_node(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(path, item)
    elif node.tag.endswith((":int", ":float")) and re.match(r"[-+]?0[0-9_]|.*:", node.value):
        line = node.start_mark.line + 1
        raise UserError(
            f"{path}: line {line}: found {node.value}, expected a number without leading 0 or colon"
        )
