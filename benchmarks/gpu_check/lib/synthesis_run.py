"""Train the networks of synthesis for a moment by the real commands, and sample from them; their own figures.

Latents are noise, and what encodes them has its first weights: how fast, and whether at all, is what is seen.
Without diffusers there is nothing to run.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .common import LOGS, REHEARSE, WORK, emit, left, require_cuda, run_command, start_cuda

STEPS = 4 if REHEARSE else 40
WINDOW, PATCH, EDGE = (8, 4, 16) if REHEARSE else (48, 4, 60)  # latent voxels, the last of volumes
SETTLED = 0 if REHEARSE else 10  # steps that figures leave out
SMALL = {
    "sit_b": ("--transformer.hidden_size=24", "--transformer.depth=1", "--transformer.num_heads=2"),
    "unet_b": ("--unet.num_channels=[8,16]", "--unet.num_heads=2", "--unet.norm_num_groups=4"),
}
COMPILED, GRAPH = "--compile=true", "--cuda_graph=true"
RUNS: dict[str, tuple[str, ...]] = {
    "sit_b, compiled, CUDA graph": ("sit_b", COMPILED, GRAPH),
    "sit_b, tokens, aligned": ("sit_b", GRAPH, "--content=tokens", "--diffusion.align=0.5"),
    "unet_b, compiled": ("unet_b", COMPILED),
}


def command(name: str, *arguments: str) -> bool:
    """Run a command of ``meduet-fast`` and tell how it went; return whether it went through."""
    began, log = time.perf_counter(), LOGS / f"synthesis-{name.replace(', ', '-').replace(' ', '-')}.txt"
    why, _ = run_command([sys.executable, "-m", __spec__.name, "--child", *arguments], log)
    emit(name, "fail" if why else "ok", why, seconds=round(time.perf_counter() - began))
    return not why


def train(name: str, config: str, options: Sequence[str], data: Path, table: Path) -> Path | None:
    """Train for some steps and tell the figures of the last ones; return the run if it went through."""
    run = WORK / "synthesis" / name.replace(", ", "-").replace(" ", "-")
    options = [
        f"--config={config}", f"--data={data}", f"--factors={table}", f"--output={run}", f"--steps={STEPS}",
        "--accumulate=1", "--held_out_fraction=0", "--power_averages=[0.1]", "--checkpoint_every=100000",
        f"--log_every={2 if REHEARSE else 5}", f"--workers={0 if REHEARSE else 8}", *options,
    ]  # fmt: skip
    if REHEARSE:
        options += ["--batch_size=2", *SMALL[config]]
    if not command(name, "synthesize", "train", *options):
        return None
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    losses = " ".join(f"{key} {last[key]:.3f}" for key in ("total", "denoising", "alignment") if key in last)
    emit(
        f"{name}, figures", "ok", f"losses: {losses}", samples_per_s=round(last["samples_per_s"], 1),
        best=round(max(record["samples_per_s"] for record in records if record["step"] >= SETTLED), 1),
        mfu=round(last.get("mfu_percent", 0), 1), memory_gb=round(last["memory_mb"] / 1e3, 1),
        data_wait_percent=round(last["data_wait_percent"], 2), step=last["step"],
    )  # fmt: skip
    return run


def make_data(folder: Path) -> tuple[Path, Path]:
    """Write a store of noise that the built-in tokenizer decodes, and an encoder."""
    from benchmarks.bench_loader import make_store
    from meduet_fast.autoencoder import load_tokenizer
    from meduet_fast.models import MeDUET, MeDUETConfig

    make_store(folder / "store", 4, (EDGE, EDGE, EDGE), load_tokenizer().identity, "builtin")
    config = MeDUETConfig(num_domains=3)
    if REHEARSE:
        config = MeDUETConfig(
            latent_size=WINDOW, patch_size=PATCH, embed_dim=24, depth=1, num_heads=2, decoder_embed_dim=12,
            decoder_depth=1, decoder_num_heads=2, num_domains=3,
        )  # fmt: skip
    MeDUET(config).save_pretrained(folder / "encoder.safetensors")
    return folder / "store", folder / "encoder.safetensors"


def main() -> int:
    """Run the part; return the exit code."""
    if sys.argv[1:2] == ["--child"]:
        start_cuda()
        from meduet_fast import cli

        return cli.main(sys.argv[2:])
    require_cuda()
    if not importlib.util.find_spec("diffusers"):
        emit("synthesis", "skip", "diffusers is not installed")
        return 0
    folder = WORK / "synthesis"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data, encoder = make_data(folder)
    table = folder / "factors.safetensors"
    options = f"--data={data}", f"--output={table}", f"--window={WINDOW}", "--tokens=true", "--exchanged=1"
    if not command("factors", "factors", str(encoder), *options):
        return 1
    for name, (config, *more) in [*RUNS.items()][REHEARSE:]:
        if left() < 20:
            emit(name, "skip", f"no time left ({left():.0f} s)")
            continue
        run = train(name, config, more, data, table)
        if run is not None:
            # In two windows, and with four branches of guidance.
            size = f"--size=[{WINDOW + PATCH},{WINDOW},{WINDOW}]"
            command(
                f"samples of {name}", "synthesize", "sample", str(run), f"--output={run / 'samples'}",
                "--content=volume_0@random", "--style=domain_1", size, "--count=2",
                "--steps=5", "--content_scale=2", "--style_scale=2", "--precision=bfloat16",
            )  # fmt: skip
            shutil.rmtree(run)
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
