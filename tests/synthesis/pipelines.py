"""A small pipeline, with all that it is made of: a store, a table of factors, an encoder and a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meduet_fast.autoencoder import load_tokenizer
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.transformer3d import MeDUETTransformer3D
from meduet_fast.synthesis.components import MeDUETAutoencoder, MeDUETEncoder, MeDUETFactors
from meduet_fast.synthesis.factors import FactorsConfig, FactorTable, write_factors
from meduet_fast.synthesis.pipeline import MeDUETPipeline
from meduet_fast.synthesis.samplers import build_scheduler

GRIDS = {"ct_a": (17, 12, 10), "ct_b": (10, 12, 13), "mr": (12, 12, 9)}
AFFINE = np.array([[1.5, 0, 0, -40.25], [0, 1.5, 0, 12.5], [0, 0, 1.5, -300.75], [0, 0, 0, 1]])
CT = {"kind": "ct_window", "low": -175.0, "high": 250.0}
MR = {"kind": "mr_percentile", "low": 0.5, "high": 99.5}


def shaken(module: torch.nn.Module, by: float = 0.1) -> Any:
    """Take every parameter away from its first value, so that zeros hide nothing."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module.requires_grad_(False).eval()


def make_store(path: Path) -> None:
    tokenizer = load_tokenizer()
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(
        path, tokenizer=tokenizer.identity, tokenizer_spec="builtin", channels=4, compression=4
    ) as writer:
        for number, (name, grid) in enumerate(GRIDS.items()):
            affine = AFFINE.copy()
            affine[0, 3] += number
            record = VolumeRecord(
                name=name, domain=name[:2], body_part="none", content_key=name, source=name, affine=affine,
                latent=torch.randn(4, *grid, generator=generator), spacing=(1.5, 1.5, 1.5),
                intensity=CT if name.startswith("ct") else MR,
            )  # fmt: skip
            writer.add(record)


def make_network(**changes: Any) -> MeDUETTransformer3D:
    sizes: dict[str, Any] = {
        "in_channels": 4, "sample_size": (8, 8, 8), "content_dim": 24, "style_dim": 6, "patch_size": 2,
        "hidden_size": 12, "depth": 2, "num_heads": 2, "content_projection": 4,
        "latents_mean": (0.5, -0.5, 0.0, 0.0), "latents_std": (1.5, 0.5, 0.5, 1.0),
    }  # fmt: skip
    torch.manual_seed(0)
    network: MeDUETTransformer3D = shaken(MeDUETTransformer3D(**{**sizes, **changes}))
    return network


def make_parts(folder: Path) -> dict[str, Any]:
    """Write a store, an encoder and its table to a folder; return what a pipeline takes of them."""
    make_store(folder / "store")
    torch.manual_seed(0)
    config = MeDUETConfig(
        latent_size=8, patch_size=2, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12,
        decoder_depth=1, decoder_num_heads=2, num_domains=2,
    )  # fmt: skip
    encoder = shaken(MeDUET(config))
    encoder.save_pretrained(folder / "encoder.safetensors")
    write_factors(
        folder / "encoder.safetensors", folder / "store", folder / "factors.safetensors",
        FactorsConfig(tokens=True),
    )  # fmt: skip
    table = FactorTable.open(folder / "factors.safetensors")
    about = {name: table.encoder[name] for name in ("weights", "weights_sha256")}
    return {
        "vae": MeDUETAutoencoder.from_tokenizer(load_tokenizer(), "builtin"),
        "encoder": MeDUETEncoder.from_model(encoder, 1.5, about),
        "factors": MeDUETFactors.from_table(table, folder / "store"),
    }


def make_pipeline(parts: dict[str, Any], scheduler: str = "dpm++", **changes: Any) -> MeDUETPipeline:
    network = make_network(**changes)
    return MeDUETPipeline(build_scheduler(scheduler, network.config.prediction), transformer=network, **parts)


def make_run(folder: Path, network: MeDUETTransformer3D) -> Path:
    """Write what a run of synthesis leaves behind, with the parts of :func:`make_parts` in ``folder``."""
    from meduet_fast.synthesis.networks import save_network

    run, table = folder / "run", FactorTable.open(folder / "factors.safetensors")
    checkpoint = run / "checkpoints" / "7"
    checkpoint.mkdir(parents=True)
    record = {
        "data": str(folder / "store"), "config": {"factors": "own"},
        "factors": str(table.path), "factors_identity": table.identity,
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    (checkpoint / "run.json").write_text(json.dumps({**record, "step": 7}))
    for name in ("network", "power_0.100"):
        save_network(network, checkpoint / f"{name}.safetensors")
    return run
