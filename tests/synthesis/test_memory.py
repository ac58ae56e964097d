"""A sample of any length, decoded by the built-in tokenizer and written, takes the memory of a short one."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nibabel.nifti1 import load
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meduet_fast.synthesis import sample as of_command
from meduet_fast.synthesis.sample import SampleConfig, sample

from .pipelines import make_parts, make_pipeline

GROWTH = 1.1  # of what is taken beside the volume, when its length doubles


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here."""


class Held(TorchDispatchMode):
    """Count bytes that are held at once: of tensors that were made under it, of Python and of numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = self.most = 0
        self._known = set[int]()  # storages of tensors, by where they are

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.look()
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.tensors += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.look()
        return out

    def look(self) -> None:
        """Take what there was since the last look."""
        self.most = max(self.most, self.tensors + tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()

    def _free(self, where: int, size: int) -> None:
        self._known.discard(where)
        self.tensors -= size


def test_what_is_held_beside_a_volume_does_not_grow_with_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its values as float32, all at once, would be 15 % more for the longer one."""
    pipeline = make_pipeline(make_parts(tmp_path))
    pipeline.vae.tokenizer.window = 32  # image voxels, so that few make a long volume
    monkeypatch.setattr(of_command, "load_pipeline", lambda *_: pipeline)

    def beside(length: int) -> int:
        """Return the most bytes at once while a volume is made, without those of its voxels."""
        config = SampleConfig(content="none", style="ct", size=(2, 2, length), steps=1, batch_size=16)
        tracemalloc.start()
        try:
            with Held() as held:
                [file] = sample(tmp_path, tmp_path / f"{length}", config).files
                held.look()
        finally:
            tracemalloc.stop()
        return held.most - np.asarray(load(file).dataobj).nbytes

    _, short, long = (beside(length) for length in (8, 96, 192))  # the first pays for what is made once
    assert long < GROWTH * short


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from nibabel.nifti1 import load
sys.path.insert(0, sys.argv[1])
from pipelines import *
from meduet_fast.autoencoder import Tokenizer
from meduet_fast.synthesis.sample import SampleConfig, sample
torch.set_num_threads(1)
Tokenizer.window = property(lambda self: 64, lambda self, _: None)  # image voxels: half of its own
folder = Path(sys.argv[2])
make_parts(folder)
run = make_run(folder, make_network())
for length in (16, 160, 320):
    config = SampleConfig(content="none", style="ct", size=(8, 8, length), steps=2)
    [file] = sample(run, folder / str(length), config).files
    if length == 16:
        begin = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    volume = np.prod(load(file).shape) * 2
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - begin - volume, volume)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux how much memory is taken")
def test_memory_of_the_command_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """What the process takes beyond its libraries and weights, which it has after a short sample."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=900,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back at once
    )  # fmt: skip
    _, (short, half), (long, whole) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert whole == 2 * half
    assert long < GROWTH * short
