"""The published code itself as a peer, run from a folder that the user has; nothing of it is copied.

It needs what its own requirements name, timm and MONAI among them. Its ``train_one_epoch`` is called on a
loader of one batch, with the optimiser that its main program builds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import logging
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from meduet_fast.pretraining import ObjectiveConfig

from .published_step import TOLERANCE, published_losses
from .step_parts import Batch, Models

PARTS = ("main_pretrain", "models_MeDUET", "engine_pretrain", "SiQC", "MFTD")


def checkout(text: str) -> Path:
    """For argparse: a folder with the published code."""
    path = Path(text)
    if not (path / "pretrain" / "main_pretrain.py").is_file():
        raise argparse.ArgumentTypeError(
            f"{text}: no checkout of the published code, which has pretrain/main_pretrain.py"
        )
    return path


class ReferencePeer:
    """A step of the published code.

    Args:
        folder: its checkout.
        models: weights to begin with; they stay as they are.
        batch: what every step is trained on; the code draws masks of its own.
        mftd: whether the distillation term is on.

    Raises:
        ImportError: if a package that the code needs is missing.
    """

    def __init__(self, folder: Path, models: Models, batch: Batch, mftd: bool) -> None:
        if str(folder / "pretrain") not in sys.path:
            sys.path.insert(0, str(folder / "pretrain"))
        main, networks, self._engine, contrast, distillation = map(importlib.import_module, PARTS)
        latents, domain, _ = batch
        self._models, self._mftd, device = models, mftd, latents.device
        args = self._args = main.get_args_parser().parse_args([])
        config = models[0].config
        args.device, args.distributed, args.rank, args.amp = device, False, 0, device.type == "cuda"
        args.MFTD_epoch = 0 if mftd else 1
        args.embed_dim, args.num_domain = config.embed_dim, config.num_domains
        args.s_ratio, args.latent_size = config.style_ratio, config.latent_size

        def network(weights: dict[str, Tensor]) -> nn.Module:
            built = networks.MeDUET(
                args, img_size=config.latent_size, patch_size=config.patch_size,
                in_chans=config.in_channels, embed_dim=config.embed_dim, depth=config.depth,
                num_heads=config.num_heads, decoder_embed_dim=config.decoder_embed_dim,
                decoder_depth=config.decoder_depth, decoder_num_heads=config.decoder_num_heads,
                mlp_ratio=config.mlp_ratio, norm_layer=partial(nn.LayerNorm, eps=config.layer_norm_eps),
            )  # fmt: skip
            missing, unexpected = built.load_state_dict(weights, strict=False)
            wrong = [name for name in (*missing, *unexpected) if not name.startswith("patch_embed.")]
            if wrong:
                raise AssertionError(f"weights that do not fit: {', '.join(wrong[:5])}")
            return built.to(device)

        self._student = network(models[0].to_reference())
        self._teacher = network(models[1].to_reference()).eval().requires_grad_(False)
        self._contrast = contrast.SiQC(args).to(device)
        self._distillation = distillation.MFTD(args).to(device)
        self._optimizer = torch.optim.AdamW(
            main.optim_factory.param_groups_weight_decay(self._student, args.weight_decay),
            lr=args.lr, betas=args.betas,
        )  # fmt: skip
        self._scaler = torch.amp.GradScaler(device.type, enabled=args.amp)
        nothing = torch.zeros(len(latents), 1, device=device)
        self._loader = [{"latent": latents, "domain": domain, "voxel": nothing, "bp": nothing}]

    def __call__(self) -> None:
        """An epoch of one step; what it prints is dropped."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self._engine.train_one_epoch(
                self._args, self._student, self._teacher, self._distillation, self._contrast, self._loader,
                self._optimizer, [self._args.momentum_start], 0, self._scaler,
                logging.getLogger("published code"),
            )  # fmt: skip

    def check(self) -> None:
        """Hold it, in float32 and before any step, to our re-implementation, on the mask that it drew.

        Raises:
            AssertionError: naming the loss that differs by more than 1e-4.
        """
        batch = self._loader[0]
        latents, domain = batch["latent"], batch["domain"]
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            parameter = [domain, batch["voxel"], batch["bp"]]
            _, status, parts, mask = self._student(latents, parameter, self._args.mask_ratio)
            passed = (latents, parts, self._student, self._teacher, mask)
            found = {
                "reconstruction": status["rec_loss"],
                "domain_content": status["domain_loss_c"],
                "domain_style": status["domain_loss_s"],
                "siqc": self._contrast(*passed),
            }
            if self._mftd:
                found["mftd"] = self._distillation(*passed)
            ours = copy.deepcopy(self._models)
            hidden = mask.reshape(len(latents), -1).bool()
            expected = published_losses(*ours, latents, domain, hidden, ObjectiveConfig(mftd=self._mftd))
        for name, loss in found.items():
            error = abs(loss.item() / expected[name].item() - 1)
            if not error <= TOLERANCE:
                raise AssertionError(f"{name} is off by {error:.3g} of itself, allowed {TOLERANCE}")
