"""Wrap what a pipeline needs beside its network: diffusers saves and reloads it, a folder for each part."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meduet_fast.autoencoder import Architecture, Tokenizer, load_tokenizer
from meduet_fast.data.store import LatentStore
from meduet_fast.data.store_index import index_path
from meduet_fast.errors import UserError, printable
from meduet_fast.files import in_real_folder
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.mixins import ConfigMixin, ModelMixin, register_to_config
from meduet_fast.weight_files import listed

from .factors import FactorTable

MAISI = "maisi"  # begins the identity of the tokenizer whose weights are not ours to hand on
TABLE = "table.safetensors"  # the whole table of factors, in a folder that it was saved to
MOST_NAMES = 20  # that a message lists


class MeDUETAutoencoder(ModelMixin, ConfigMixin):
    """Hold a tokenizer: its weights, but of MAISI's only where they are.

    Args:
        identity: of the tokenizer.
        architecture: fields of :class:`~meduet_fast.autoencoder.Architecture`.
        scale, window: see :class:`~meduet_fast.autoencoder.Tokenizer`.
        path: file with the weights; None if they are saved with the pipeline.

    Raises:
        UserError: if the weights are not at their path, or are others.
    """

    @register_to_config
    def __init__(
        self,
        identity: str,
        architecture: dict[str, Any],
        scale: float = 1.0,
        window: int = 128,
        path: str | None = None,
    ) -> None:
        super().__init__()
        # Lists, where they come from a file.
        sizes: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in architecture.items()
        }
        self._architecture = Architecture(**sizes)
        self._tokenizer: Tokenizer | None = None
        if path is None:
            self.network = self._architecture.build()
            return
        try:
            self.network = load_tokenizer(path).network
        except UserError as error:
            raise UserError(f"vae: the weights of {identity} are no part of a pipeline: {error}") from error

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, path: Path | str) -> MeDUETAutoencoder:
        """Wrap a tokenizer that was read from ``path``."""
        place = None
        if _name(tokenizer.identity) == MAISI:
            place = printable(in_real_folder(Path(path).expanduser()))
        wrapped = cls(
            tokenizer.identity, asdict(tokenizer.architecture), tokenizer.scale, tokenizer.window, place
        )
        wrapped.network.load_state_dict(tokenizer.network.state_dict())
        return wrapped.to(tokenizer.device)

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer, which works where the weights are.

        Raises:
            UserError: if the weights are others than those that were saved.
        """
        if self._tokenizer is None:
            expected, scale, window = self.config.identity, self.config.scale, self.config.window
            found = Tokenizer(self._architecture, self.network, _name(expected), scale, window)
            if found.identity != expected:
                raise UserError(f"vae: found the weights of {found.identity}, expected those of {expected}")
            self._tokenizer = found
        return self._tokenizer

    def save_pretrained(self, save_directory: Path | str, **options: Any) -> None:
        """Write the folder; see diffusers."""
        if self.config.path is None:
            super().save_pretrained(save_directory, **options)
        else:
            self.save_config(save_directory)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **options: Any) -> MeDUETAutoencoder:
        """Read what :meth:`save_pretrained` wrote; see diffusers.

        Raises:
            UserError: if the weights are not at their path, or are others.
        """
        config = cls.load_config(folder, local_files_only=True)
        if config.get("path") is None:
            wrapped = super().from_pretrained(folder, **options)
        else:
            wrapped = cls.from_config(config)
        wrapped.tokenizer  # noqa: B018  here it is compared
        return wrapped


def _name(identity: str) -> str:
    return identity.rpartition("-")[0]


class MeDUETEncoder(ModelMixin, ConfigMixin):
    """Hold the pretrained network that factors come from.

    Args:
        sizes: fields of :class:`~meduet_fast.models.MeDUETConfig`.
        spacing: mm between voxels of an image that is encoded.
        about: where it comes from: ``weights`` and ``weights_sha256``.
    """

    @register_to_config
    def __init__(self, sizes: dict[str, Any], spacing: float, about: dict[str, str]) -> None:
        super().__init__()
        self.network = MeDUET(MeDUETConfig(**sizes)).requires_grad_(False)

    @classmethod
    def from_model(cls, model: MeDUET, spacing: float, about: Mapping[str, str]) -> MeDUETEncoder:
        """Wrap a network."""
        wrapped = cls(asdict(model.config), spacing, dict(about))
        wrapped.network.load_state_dict(model.state_dict())
        return wrapped.to(model.cls_token.device).eval()


class MeDUETFactors(ModelMixin, ConfigMixin):
    """Hold a table of factors, but for its maps of tokens: they stay in the table's file.

    Args:
        rows: N, windows of the table.
        content_dim, style_dim: D and Ds.
        window: edges (x, y, z) of a window in latent voxels.
        patch: edge of the encoder's patches.
        volumes: records of the table, with the ``affine`` of the prepared image and the ``intensity`` rule
            where the store told them.
        encoder: what encoded: ``weights``, ``weights_sha256`` and more.
        tokenizer: identity of what made the latents.
        whole: whether the factors of a window are those of its volume, the published way; maps are not.
        table: the file.
        identity: of the table.
        store: folder with the latents; None if it was not there.
    """

    content: Tensor
    style: Tensor
    volume: Tensor
    start: Tensor

    @register_to_config
    def __init__(
        self,
        rows: int,
        content_dim: int,
        style_dim: int,
        window: tuple[int, int, int],
        patch: int,
        volumes: list[dict[str, Any]],
        encoder: dict[str, Any],
        tokenizer: str,
        whole: bool,
        table: str,
        identity: str,
        store: str | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("content", torch.zeros(rows, content_dim))  # (N, D)
        self.register_buffer("style", torch.zeros(rows, style_dim))  # (N, Ds)
        self.register_buffer("volume", torch.zeros(rows, dtype=torch.int64))  # (N,)
        self.register_buffer("start", torch.zeros(rows, 3, dtype=torch.int64))  # (N, 3)
        self._store: LatentStore | None = None

    @classmethod
    def from_table(
        cls, table: FactorTable, store: Path | str | None = None, whole: bool = False
    ) -> MeDUETFactors:
        """Take a table's windows, and from a store what the table does not know of its volumes.

        Args:
            table: the table.
            store: the latents that it was made of; it may be gone.
            whole: see the class.

        Raises:
            UserError: if the store is damaged, or is of another tokenizer.
        """
        latents = LatentStore.open(store) if store is not None and index_path(Path(store)).exists() else None
        found: dict[str, dict[str, str]] = {}
        if latents is not None:
            if latents.index.tokenizer != table.tokenizer:
                raise UserError(
                    f"{table.path}: factors of latents of {table.tokenizer}, {store} has those of "
                    f"{latents.index.tokenizer}: expected a table of this store"
                )
            found = {entry.name: latents.metadata(index) for index, entry in enumerate(latents.entries)}
        records: list[dict[str, Any]] = []
        for record in table.volumes:
            labels = found.get(record["name"], {})
            told = [name for name in ("affine", "intensity") if name in labels]
            known: dict[str, Any] = {name: json.loads(labels[name]) for name in told}
            records.append({**record, **known})
        (rows, content_dim), style_dim = table.content.shape, table.style.shape[1]
        wrapped = cls(
            rows, content_dim, style_dim, table.window, table.patch, records, table.encoder, table.tokenizer,
            whole, printable(in_real_folder(table.path)), table.identity,
            None if latents is None else printable(in_real_folder(latents.path)),
        )  # fmt: skip
        wrapped.volume.copy_(table.volume)
        wrapped.start.copy_(table.start)
        pair = table.volume_factors() if whole else (table.content, table.style)
        for buffer, factor in zip((wrapped.content, wrapped.style), pair, strict=True):
            buffer.copy_(factor[table.volume] if whole else factor)
        return wrapped

    @property
    def volumes(self) -> Sequence[Mapping[str, Any]]:
        """Return the records of the volumes."""
        return self.config.volumes

    def find(self, name: str) -> int | None:
        """Return the position of a volume; None if there is none of this name."""
        return next((number for number, one in enumerate(self.volumes) if one["name"] == name), None)

    def of_domain(self, name: str) -> list[int]:
        """Return the positions of a domain's volumes."""
        return [number for number, one in enumerate(self.volumes) if one["domain"] == name]

    def known(self, domains: bool) -> str:
        """List volumes, perhaps domains too, for a message."""
        names = [one["name"] for one in self.volumes]
        names += [one["domain"] for one in self.volumes] * domains
        return listed(list(dict.fromkeys(names)), MOST_NAMES)

    def rows(self, volumes: Sequence[int]) -> Tensor:
        """Return the rows of all windows of some volumes, ascending, (n,) int64."""
        return torch.isin(self.volume, self.volume.new_tensor(volumes)).nonzero()[:, 0]

    def nearest(self, volume: int, start: Sequence[int]) -> int:
        """Return the row of a volume's window that begins nearest to a place."""
        rows = self.rows([volume])
        away = (self.start[rows] - self.start.new_tensor(start)).square().sum(1)  # (n,)
        return int(rows[away.argmin()])

    def table_file(self) -> Path:
        """Find the table with its maps: in the folder that this was loaded from, or where it was."""
        beside = Path(self.config.get("_name_or_path") or "", TABLE)
        return beside if beside.is_file() else Path(self.config.table)

    def content_map(
        self, volume: int, start: Sequence[int], size: Sequence[int], standardised: bool
    ) -> Tensor:
        """Read the content of a box of a volume, (X, Y, Z, D); see :meth:`FactorTable.content_map`.

        Raises:
            UserError: if the table is not there any more, is damaged, is another one, or has no maps.
        """
        if self._maps is None:
            raise UserError(
                f"{self.table_file()}: absent, or another table of factors than when the pipeline was made"
            )
        return self._maps.content_map(volume, start, size, standardised=standardised)

    @cached_property
    def _maps(self) -> FactorTable | None:
        """Open the table with its maps; None if it is not there any more, or another one is in its place."""
        table = FactorTable.open(self.table_file()) if self.table_file().exists() else None
        return table if table is not None and table.identity == self.config.identity else None

    def pooled_content(
        self, volume: int, start: Sequence[int], size: Sequence[int]
    ) -> tuple[Tensor, int | None]:
        """Return the mean content of a box of a volume, as near as the table knows it.

        Returns:
            (D,), where the table is: that of the window which is the box, else the mean over the box's
            tokens, else, where there are no maps, that of the window that begins nearest. And the row of this
            window if it is not the box; None if the content is the box's own.

        Raises:
            UserError: if the table is damaged.
        """
        row = self.nearest(volume, start)
        is_box = self.start[row].tolist() == list(start) and list(size) == list(self.config.window)
        if is_box or self.config.whole:
            return self.content[row], None
        if self._maps is not None and self._maps.tokens:
            mean = self._maps.content_map(volume, start, size).mean((0, 1, 2))  # (D,)
            return mean.to(self.content.device), None
        return self.content[row], row

    def latents(self, volume: int, start: Sequence[int], size: tuple[int, int, int]) -> Tensor:
        """Read the latents of a box of a volume, (C, x, y, z) float32.

        Raises:
            UserError: if the store is not there, has not this volume any more, or its file is damaged.
        """
        record = self.volumes[volume]
        if self._store is None:
            if self.config.store is None or not index_path(Path(self.config.store)).exists():
                where = self.config.store or "no store is known"
                raise UserError(f"{record['name']}: its latents are not there ({where}): expected a store")
            self._store = LatentStore.open(self.config.store)
        for index, entry in enumerate(self._store.entries):
            if (entry.name, entry.content_key) == (record["name"], record["content_key"]):
                return self._store.read_crops([index], [start], size)[0].float()
        raise UserError(f"{self._store.path}: no volume {record['name']} any more of which the factors are")
