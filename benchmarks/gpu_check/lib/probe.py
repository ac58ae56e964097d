"""Measure what decides the next form of the step: races, products, short attention, one block.

Shapes are ViT-B's with 64 crops: 64 * 217 rows of tokens, and two and four times as many, of widths 768
(encoder) and 384 (decoder). Each line stands alone.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from .common import REHEARSE, emit, first_lines, left, start_cuda

DATA_SHEET = 989e12  # dense bfloat16 FLOP/s of an H100 or H200 with SXM


def milliseconds(run: Callable[[], Any], rounds: int = 12) -> float:
    """Return the median device time of a call, after three that don't count."""
    import torch

    for _ in range(3):
        run()
    times = []
    for _ in range(2 if REHEARSE else rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return max(statistics.median(times), 1e-6)


def race(runs: int = 300) -> None:
    """Embed float32 latents under autocast: the same bits as bfloat16 ones, every time?"""
    import torch

    from meduet_fast.kernels import patch_embed_3d

    if REHEARSE:
        emit("race", "skip", "the stand-in has no autocast")
        return
    for batch in (16, 64, 256):
        x = torch.randn(batch, 4, 24, 24, 24, device="cuda")
        weight = torch.randn(768, 4, 4, 4, 4, device="cuda") / 16
        bias, position = torch.randn(768, device="cuda"), torch.randn(216, 768, device="cuda")
        mask = torch.rand(batch, 216, device="cuda").argsort(1) < 108  # (B, L)
        differ, worst = 0, 0.0
        with torch.autocast("cuda", torch.bfloat16):
            want = patch_embed_3d(x.bfloat16(), weight, bias, position, mask, 1)
            for _ in range(runs):
                got = patch_embed_3d(x, weight, bias, position, mask, 1)
                if not torch.equal(got, want):
                    differ += 1
                    worst = max(worst, (got.float() - want.float()).abs().max().item())
        emit(f"race B={batch}", "fail" if differ else "ok", f"{differ} of {runs} runs differ", worst=worst)


def attend(batch: int, heads: int, width: int) -> dict[str, str]:
    """Time PyTorch's backends at 217 tokens; q, k, v are strided views of one tensor, as blocks make them."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = batch, 217, 3, heads, width
    qkv = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(batch, heads, 217, width, device="cuda", dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, 217, D) each
        return F.scaled_dot_product_attention(q, k, v)  # (B, H, 217, D)

    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        name = backend.name.split("_")[0].lower()
        try:
            with sdpa_kernel(backend):
                with torch.no_grad():
                    alone = milliseconds(forward)
                both = milliseconds(lambda: torch.autograd.grad(forward(), qkv, gradient))
            found[name] = f"{1e3 * alone:.0f}/{1e3 * both:.0f}us"
        except Exception as error:
            found[name] = type(error).__name__
    return found


def attention() -> None:
    """Tell the times of attention in the encoder and the decoder, forward and with backward."""
    for batch, heads, width in ((2, 2, 16),) if REHEARSE else ((64, 12, 64), (256, 12, 64), (256, 12, 32)):
        figures: dict[str, Any] = {**attend(batch, heads, width)}
        text = f"forward / forward+backward; {4e-9 * batch * heads * 217 * 217 * width:.3f} GF forward"
        emit(f"attention B={batch} H={heads} d={width}", "ok", text, **figures)


def block() -> None:
    """Time an encoder block per crop: does a batch that stays in L2 pay? Do fixed sizes?"""
    import torch

    from meduet_fast.models.blocks import Block

    for dynamic in (True, False):
        for batch in (2,) if REHEARSE else (16, 32, 64, 128, 256):
            if left() < 12:
                return
            torch.manual_seed(0)
            torch._dynamo.reset()
            compiled = torch.compile(Block(768, 12, 4.0, 1e-6).cuda(), fullgraph=True, dynamic=dynamic)
            x = torch.randn(batch, 217, 768, device="cuda", requires_grad=True)

            def both(compiled: Any = compiled, x: torch.Tensor = x) -> None:
                with torch.autocast("cuda", torch.bfloat16):
                    y = compiled(x)
                y.backward(torch.ones_like(y))

            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                forward = milliseconds(partial(compiled, x))
            spent = milliseconds(both)
            flops = 3 * batch * (217 * 2 * 12 * 768 * 768 + 4 * 217 * 217 * 768)
            emit(
                f"block B={batch} {'dynamic' if dynamic else 'static'}", "ok",
                forward_us_a_crop=round(1e3 * forward / batch, 2),
                both_us_a_crop=round(1e3 * spent / batch, 2),
                mfu_989=round(1e5 * flops / spent / DATA_SHEET, 1),
            )  # fmt: skip


def rates(rows: int, inner: int, outer: int) -> dict[str, Any]:
    """Return TFLOP/s of a layer's products: forward, both gradients, in float8, with a GELU."""
    import torch

    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(outer, inner, device="cuda", dtype=torch.bfloat16)
    g = torch.randn(rows, outer, device="cuda", dtype=torch.bfloat16)
    bias = x.new_zeros(outer)
    x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    scales = torch.ones(rows, 1, device="cuda"), torch.ones(1, outer, device="cuda")
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "forward": lambda: x @ w.t(),  # (rows, outer)
        "grad_x": lambda: g @ w,  # (rows, inner)
        "grad_w": lambda: g.t() @ x,  # (outer, inner)
        "grad_w_fp32": lambda: torch.mm(g.t(), x, out_dtype=torch.float32),  # (outer, inner)
        "float8": lambda: torch._scaled_mm(
            x8, w8.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "with_tanh_gelu": lambda: torch._addmm_activation(bias, x, w.t(), use_gelu=True),  # (rows, outer)
    }
    found: dict[str, Any] = {}
    for name, run in forms.items():
        try:
            found[name] = round(2e-9 * rows * inner * outer / milliseconds(run))
        except Exception as error:
            found[name] = type(error).__name__
    return found


def products(width: int) -> None:
    """Measure the products of a block of this width."""
    layers = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # input and output, in widths
    for rows in (128,) if REHEARSE else (13888, 27776, 55552):
        for name, (inner, outer) in layers.items():
            if left() < 4:
                return
            figures = rates(rows, width * inner, width * outer)
            emit(f"product {name} {rows}x{width * inner}x{width * outer}", "ok", **figures)


def main() -> int:
    """Run the part; return the exit code."""
    start_cuda()
    import torch

    probes: dict[str, tuple[Callable[[], None], float]] = {
        "race": (race, 10), "attention": (attention, 10), "block": (block, 25),
        "products 768": (partial(products, 768), 8), "products 384": (partial(products, 384), 8),
    }  # fmt: skip
    for name, (run, least) in probes.items():
        if left() < least:
            emit(name, "skip", f"{left():.0f} s left")
            continue
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            emit(name, "fail", first_lines(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
