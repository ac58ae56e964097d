"""Start a run from weights that exist: an export of another run, or a published checkpoint.

Student and teacher begin as two copies of the same network, as they do in a run without: whatever the file
was, a teacher or a student, the average that the teacher becomes starts from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from meduet_fast.engine.beginning import Beginning
from meduet_fast.engine.dry_run import Rows, count_tensors
from meduet_fast.errors import UserError
from meduet_fast.files import file_sha256
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.config import PUBLISHED_HEADS, read_sizes, stated_or_published
from meduet_fast.models.published import read_published
from meduet_fast.weight_files import Weights, listed, misfit

_ENCODER = ("embed_layer.", "cls_token", "blocks.", "norm.")
# May have another shape: the former follow from the number of tokens, the latter from the data sets.
_RESIZED = ("pos_embed", "decoder_pos_embed", "domain_classifier.")
_SIZES = ("in_channels", "patch_size", "embed_dim", "depth", "decoder_embed_dim", "decoder_depth")


@dataclass(frozen=True)
class InitialWeights:
    """What a run starts from.

    Attributes:
        file: it.
        sha256: of the file.
        part: which of several networks in it, the prefix of its names.
        loaded: what the run takes over, by name.
        fresh: what the file has not, or not in this shape: it starts as in any run.
        left_out: what the file has beyond.
        assumed: heads that nothing in the file states.
    """

    file: Path
    sha256: str
    part: str
    loaded: Mapping[str, Tensor]
    fresh: Mapping[str, Tensor]
    left_out: Mapping[str, Tensor]
    assumed: tuple[str, ...] = ()

    def beginning(self) -> Beginning:
        """Return it as what the engine's runs begin from."""
        return Beginning(self.record(), self.loaded, self.rows())

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` keeps of it, as JSON."""
        return {"path": str(self.file.resolve()), "sha256": self.sha256, "part": self.part}

    def rows(self) -> Rows:
        """Return a table of what is loaded, left fresh and left out, in tensors and parameters."""
        named = f", {self.part!r} in it" if self.part else ""
        rows = [("init", f"{self.file}{named}, SHA-256 {self.sha256[:12]}..., for student and teacher")]
        for what, tensors in (
            ("loaded", self.loaded), ("left fresh", self.fresh), ("left out", self.left_out),
        ):  # fmt: skip
            rows.append(("init", count_tensors(what, tensors)))
        for name in self.assumed:
            rows.append(("init", f"{name} not stated in the file; taken from model.{name}"))
        return rows


def read_initial(path: Path, model: MeDUET) -> InitialWeights:
    """Read what a network can take over from a file.

    Args:
        path: a file or folder of ``meduet-fast export``, in the formats "meduet" and "reference", or a
            published checkpoint; see :func:`~meduet_fast.models.published.read_published`.
        model: the network, perhaps on the meta device; it is not changed.

    Raises:
        UserError: naming the file, if it can't be read, is of another size, or has not the whole encoder.
    """
    file, weights = read_published(path)
    own = model.state_dict()
    try:
        assumed = _check_sizes(weights, model.config)
        loaded = {
            name: value
            for name, value in weights.tensors.items()
            if name in own and (value.shape == own[name].shape or not name.startswith(_RESIZED))
        }
        if missing := [name for name in own if name.startswith(_ENCODER) and name not in loaded]:
            raise ValueError(f"less than the whole encoder, {len(missing)} missing: {listed(missing)}")
        if problems := misfit(loaded, {name: own[name] for name in own if name in loaded}):
            raise ValueError(f"weights that do not fit: {problems}")
    except ValueError as error:
        raise UserError(f"{file}: {error}{weights.described()}") from error
    return InitialWeights(
        file,
        file_sha256(file),
        weights.part,
        loaded,
        {name: value for name, value in own.items() if name not in loaded},
        {name: value for name, value in weights.tensors.items() if name not in loaded} | weights.others,
        assumed,
    )


def _check_sizes(weights: Weights, config: MeDUETConfig) -> tuple[str, ...]:
    """Refuse weights of another network, and return which of its heads nothing tells.

    Raises:
        ValueError: naming what differs, in the file and in the run.
    """
    sizes, run = read_sizes(weights.tensors), asdict(config)
    differing = [name for name in _SIZES if name in sizes and sizes[name] != run[name]]
    if differing:
        both = ", ".join(f"{name} {sizes[name]} (model.{name} is {run[name]})" for name in differing)
        raise ValueError(f"weights of another network: {both}")
    said = stated_or_published(weights.beside, sizes)
    config.check_stated(said)
    return tuple(
        name
        for name in PUBLISHED_HEADS
        if name.replace("num_heads", "embed_dim") in sizes and not said.get(name)
    )
