"""Kernels and layers need torch and triton alone; all else says which extra it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meduet_fast.errors import MissingExtra, needs_extra

# Makes everything but Python's own modules, torch with what it requires, and triton look not installed.
BARE = """
import sys

PRESENT = {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "triton", "meduet_fast",
           "filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "fsspec",
           "setuptools", "nvidia", "cuda"}

class Bare:
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PRESENT or name.startswith("_sysconfigdata"):
            found = (finder.find_spec(name, path, target) for finder in self.finders)
            return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *context):
        for finder in self.finders:
            yield from getattr(finder, "find_distributions", lambda *_: ())(*context)

sys.meta_path[:] = [Bare([*sys.meta_path])]
"""

WORKS = """
import torch
from torch import nn
from meduet_fast import kernels, layers

x = torch.randn(2, 8, 8, 8, 8, requires_grad=True)
weight, bias = torch.ones(8), torch.zeros(8)
plain = nn.functional.silu(nn.functional.group_norm(x, 4, weight, bias))
torch.testing.assert_close(kernels.group_norm_silu(x, 4, weight, bias), plain)

model = nn.Sequential(nn.Conv3d(8, 16, 2, 2), nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()))
before = model(x)
print([swap.after for swap in layers.accelerate(model)])
after = model(x)
torch.testing.assert_close(after, before)
after.sum().backward()
assert x.grad.isfinite().all()
assert "numpy" not in sys.modules
"""

REFUSES = """
for room in ("models", "engine", "autoencoder", "pretraining", "encoding", "probing", "synthesis", "report"):
    try:
        __import__(f"meduet_fast.{room}")
    except ImportError as error:
        print(error)
from meduet_fast.__main__ import main
print(main())
"""


def test_kernels_and_layers_need_torch_and_triton_alone() -> None:
    """Numpy is not there either: torch warns of it once, to stderr."""
    command = [sys.executable, "-c", BARE + WORKS + REFUSES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    swaps, *refusals, exit_code = done.stdout.splitlines()
    assert swaps == "['patch_embed_3d', 'group_norm_silu']"
    hint = "is not installed: pip install '.[train]' in a clone of meduet-fast"
    assert len(refusals) == 8
    assert all(line.endswith(hint) for line in refusals), refusals
    assert (done.stderr.splitlines()[-1], exit_code) == (f"meduet-fast: jsonargparse {hint}", "2")


# Each stage imports more than the one before it; in the last one diffusers is not there.
STAGES = """
import sys
import torch

def untouched(*names):
    assert not {*names} & {*sys.modules}, names

def helped(command):
    try:
        main([*command.split(), "--help"])
    except SystemExit as stop:
        assert stop.code == 0, command

from meduet_fast.layers import accelerate
accelerate(torch.nn.Conv3d(1, 1, 2, 2))
untouched("monai", "diffusers")
import meduet_fast.models
untouched("diffusers")
import meduet_fast.cli
from meduet_fast.engine.precision import use_float8
untouched("torchao", "diffusers")
use_float8([torch.nn.Sequential(torch.nn.Linear(16, 16))], torch.device("cpu"))
assert "torchao" in sys.modules

print("quiet until here", file=sys.stderr)
from meduet_fast.cli import COMMANDS, main
import meduet_fast.synthesis, meduet_fast.synthesis.factors, meduet_fast.synthesis.crops
for command in COMMANDS:
    if not command.startswith("synthesize"):
        helped(command)
main(["factors", "absent", "--data", "absent", "--output", "here.safetensors"])
untouched("diffusers")

class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "diffusers":
            raise ModuleNotFoundError(name=name)

print("without diffusers", file=sys.stderr)
sys.meta_path.insert(0, Without())
for command in COMMANDS:
    if command.startswith("synthesize"):
        helped(command)
main(["synthesize", "train", "--data", "a", "--factors", "b", "--output", "c"])
"""


def test_packages_are_imported_where_they_are_used(tmp_path: Path) -> None:
    """MONAI, torchao (silent) and diffusers, of synthesis alone, which names its extra in one line."""
    command = [sys.executable, "-c", STAGES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("without diffusers\n")
    assert before.startswith("quiet until here\n")
    lines = after.splitlines()
    hint = "diffusers is not installed: pip install '.[synthesis]' in a clone of meduet-fast"
    assert all(line.startswith("meduet-fast synthesize ") and line.endswith(hint) for line in lines), lines
    assert lines[-1].startswith("meduet-fast synthesize train: ")


def test_only_packages_of_others_are_of_an_extra() -> None:
    with (
        pytest.raises(MissingExtra, match=r"no_such_package is not installed: pip install '\.\[itk\]'"),
        needs_extra("itk"),
    ):
        import no_such_package  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=r"meduet_fast\.no_such_module"), needs_extra("train"):
        import meduet_fast.no_such_module  # noqa: F401
