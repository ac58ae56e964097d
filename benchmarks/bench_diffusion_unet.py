"""The diffusion U-Net beside MONAI's DiffusionModelUNet of equal widths: training steps, and samples forward.

``python -m benchmarks.bench_diffusion_unet [--device cpu] [--quick] [--json PATH]``

Both have the same channels, residual blocks, attention levels and heads, and one token as context; both use
PyTorch's fused attention, and both are compiled whole. A step is forward, backward and AdamW. bfloat16 is by
autocast, with float32 weights. They are not one function: ours is held to its own definition, MONAI's to
finite numbers of the right shape.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .command import cases_command
from .harness import Case, Variant, not_importable
from .operations import BOTH, FORWARD
from .published_step import relative
from .tables import OURS

TOLERANCE = 1e-4  # of output and gradients in float32, relative
LOW_TOLERANCE = 0.05  # of the same in bfloat16
CONTENT, STYLE = 768, 192  # widths of the factors
PEER = "MONAI"
NAMES = (OURS, f"{OURS}, not compiled", f"{PEER}, compiled", PEER)


class Setting(NamedTuple):
    """Sizes that both networks have."""

    edge: int  # of the latents, 4 channels
    batch: int
    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    blocks: int
    heads: int
    groups: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.edge}^3 {'-'.join(map(str, self.channels))} B={self.batch}"


SMALL = Setting(12, 4, (32, 64), (False, True), 1, 4, 16)
MIDDLE = Setting(24, 1, (32, 64, 128), (False, True, True), 2, 4, 16)
LARGE = Setting(24, 16, (128, 256, 512), (False, True, True), 2, 8, 32)


def drawn(model: nn.Module) -> nn.Module:
    """Draw what starts as zeros, which would hide errors and cost a compiler nothing."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


def our_network(setting: Setting) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Build ours, and what it takes besides latents."""
    from meduet_fast.models.unet3d import MeDUETUNet3D

    model = MeDUETUNet3D(
        sample_size=(setting.edge,) * 3, content_dim=CONTENT, style_dim=STYLE, num_channels=setting.channels,
        num_res_blocks=setting.blocks, attention_levels=setting.attention, num_heads=setting.heads,
        norm_num_groups=setting.groups,
    )  # fmt: skip
    times = torch.linspace(1, 999, setting.batch)
    return model, (times, torch.randn(setting.batch, CONTENT), torch.randn(setting.batch, STYLE))


def monai_network(setting: Setting) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Build MONAI's, and what it takes besides latents.

    Raises:
        ImportError: if MONAI is not installed.
    """
    from monai.networks.nets import DiffusionModelUNet

    width = 4 * setting.channels[0]
    model = DiffusionModelUNet(
        spatial_dims=3, in_channels=4, out_channels=4, channels=setting.channels,
        attention_levels=setting.attention, num_res_blocks=setting.blocks,
        num_head_channels=[channels // setting.heads for channels in setting.channels],
        norm_num_groups=setting.groups, with_conditioning=True, cross_attention_dim=width,
        use_flash_attention=True,
    )  # fmt: skip
    times = torch.linspace(1, 999, setting.batch)
    return model, (times, torch.randn(setting.batch, 1, width))


def results(run: nn.Module, inputs: tuple[Tensor, ...], low: bool) -> dict[str, Tensor]:
    """Compute the output and the gradient of the latents, which has come through every layer."""
    latents = inputs[0].detach().requires_grad_()
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=low):
        output = run(latents, *inputs[1:])
    (gradient,) = torch.autograd.grad(output.float().square().sum(), latents)
    return {"output": output.detach().float(), "gradient": gradient.float()}


def require_same(run: nn.Module, plain: nn.Module, inputs: tuple[Tensor, ...], low: bool) -> None:
    """Hold ours to its definition: eager, in float32.

    Raises:
        AssertionError: naming what is off.
    """
    expected = results(plain, inputs, low=False)
    for name, found in results(run, inputs, low).items():
        error, allowed = relative(found, expected[name]), LOW_TOLERANCE if low else TOLERANCE
        if not error <= allowed:
            raise AssertionError(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")


def require_sound(run: nn.Module, inputs: tuple[Tensor, ...], low: bool) -> None:
    """Hold MONAI's to finite numbers, as many as there are latents.

    Raises:
        AssertionError: naming what is not.
    """
    for name, found in results(run, inputs, low).items():
        if found.shape != inputs[0].shape or not found.isfinite().all():
            raise AssertionError(f"{name} has shape {tuple(found.shape)} or is not finite")


def variants(setting: Setting, device: torch.device, direction: str) -> list[Variant]:
    """Ours and MONAI's, compiled and not, on the same latents."""
    torch.compiler.reset()
    low = device.type == "cuda"
    torch.manual_seed(0)
    latents = torch.randn(setting.batch, 4, *[setting.edge] * 3, device=device)

    def pair(name: str, build: Callable[[Setting], tuple[nn.Module, tuple[Tensor, ...]]]) -> list[Variant]:
        torch.manual_seed(0)
        try:
            model, others = build(setting)
        except ImportError as error:
            return [Variant(f"{name}{how}", unavailable=not_importable(error)) for how in ("", ", compiled")]
        model, inputs = drawn(model).to(device), (latents, *(item.to(device) for item in others))
        copied = copy.deepcopy(model)
        copied.compile(dynamic=False)
        checks: list[Callable[[], object] | None] = [
            partial(require_sound, run, inputs, low) for run in (copied, model)
        ]
        if name == OURS:
            checks = [
                partial(require_same, run, copy.deepcopy(model), inputs, low) for run in (copied, model)
            ]
        names = (OURS, f"{OURS}, not compiled") if name == OURS else (f"{name}, compiled", name)
        return [
            Variant(label, calls(run, inputs, low, direction), check)
            for label, run, check in zip(names, (copied, model), checks, strict=True)
        ]

    return [*pair(OURS, our_network), *pair(PEER, monai_network)]


def calls(run: nn.Module, inputs: tuple[Tensor, ...], low: bool, direction: str) -> Callable[[], object]:
    """Return what is timed: a pass without gradients, or a step of training."""
    autocast = partial(torch.autocast, inputs[0].device.type, torch.bfloat16, enabled=low)

    def sample() -> object:
        with torch.no_grad(), autocast():
            return run(*inputs)

    optimizer = torch.optim.AdamW(run.parameters(), lr=1e-6)

    def step() -> object:
        with autocast():
            output = run(*inputs)
        loss = (output.float() - inputs[0]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step if direction == BOTH else sample


def flops(setting: Setting, direction: str) -> int:
    """Count the FLOPs of a pass or step of ours, on shapes alone."""
    with torch.device("meta"):
        model, others = our_network(setting)
        latents = torch.empty(setting.batch, 4, *[setting.edge] * 3)
    with FlopCounterMode(display=False) as counter:
        output = model(latents, *others)
        if direction == BOTH:
            output.sum().backward()
    return counter.get_total_flops()


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Sizes that suit the device, forward and a whole step."""
    for setting in (LARGE,) if device.type == "cuda" else (SMALL,) if quick else (SMALL, MIDDLE):
        for direction in (FORWARD, BOTH):
            yield Case(
                bench="diffusion_unet",
                name=setting.name,
                dtype="bfloat16" if device.type == "cuda" else "float32",
                direction=direction,
                shape={"edge": setting.edge, "batch": setting.batch},
                bytes=None,
                flops=flops(setting, direction),
                build=partial(variants, setting, device, direction),
                per_call={"samples": setting.batch, **({"steps": 1} if direction == BOTH else {})},
                clock="wall",
                names=NAMES,
            )


def test_diffusion_unet(benchmark: Any, variant: Variant) -> None:
    benchmark(variant.call)


if __name__ == "__main__":
    sys.exit(cases_command(cases, __doc__ or ""))
