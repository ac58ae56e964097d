"""Models of MONAI before and after ``accelerate``: the same numbers, and the time of forward and backward.

``python -m benchmarks.bench_accelerate [--device cpu] [--repeats 7] [--only NAME ...] [--json PATH]``

Each model is built twice with the same weights, one of the two is accelerated, and both get the same input.
No time is taken before outputs and gradients agree, in float64: in float32 a rounding that carries one value
across the kink of a LeakyReLU shifts gradients by up to a percent, with the original model as with ours. Both
take turns in float32; the median of the ratios counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import monai
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import UNETR, AutoencoderKL, DiffusionModelUNet, MaskedAutoEncoderViT, ViT
from torch import Tensor, nn

from meduet_fast.layers import accelerate

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


class Case(NamedTuple):
    """One model.

    Attributes:
        name: for tables.
        build: the model, and its inputs on the CPU.
        check: dtype in which outputs and gradients are compared.
    """

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    check: torch.dtype = torch.float64


def _vit(proj_type: str) -> tuple[nn.Module, tuple[Any, ...]]:
    model = ViT(
        in_channels=1, img_size=(48, 48, 48), patch_size=8, hidden_size=192, mlp_dim=384, num_layers=4,
        num_heads=6, proj_type=proj_type, pos_embed_type="learnable",
    )  # fmt: skip
    return model, (torch.randn(2, 1, 48, 48, 48),)


def _unetr() -> tuple[nn.Module, tuple[Any, ...]]:
    model = UNETR(
        in_channels=1, out_channels=4, img_size=(48, 48, 48), feature_size=8, hidden_size=192, mlp_dim=384,
        num_heads=6, proj_type="conv",
    )  # fmt: skip
    return model, (torch.randn(1, 1, 48, 48, 48),)


def _masked_autoencoder() -> tuple[nn.Module, tuple[Any, ...]]:
    model = MaskedAutoEncoderViT(
        in_channels=1, img_size=48, patch_size=8, hidden_size=192, mlp_dim=384, num_layers=4, num_heads=6,
        decoder_hidden_size=96, decoder_mlp_dim=192, decoder_num_layers=2, decoder_num_heads=6,
    )  # fmt: skip
    return model, (torch.randn(2, 1, 48, 48, 48),)


def _diffusion(conditioned: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    model = DiffusionModelUNet(
        spatial_dims=3, in_channels=4, out_channels=4, channels=(32, 64), attention_levels=(False, True),
        num_res_blocks=1, num_head_channels=16, norm_num_groups=16, with_conditioning=conditioned,
        cross_attention_dim=32 if conditioned else None,
    )  # fmt: skip
    for parameter in model.parameters():
        # Its last layers start as zeros, which would hide differences.
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    context = (torch.randn(1, 8, 32),) if conditioned else ()
    return model, (torch.randn(1, 4, 16, 16, 16), torch.tensor([10]), *context)


def _maisi() -> tuple[nn.Module, tuple[Any, ...]]:
    model = AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, num_channels=(16, 32, 32),
        num_res_blocks=(1, 1, 1), norm_num_groups=16, norm_eps=1e-6, attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, use_checkpointing=False,
        use_convtranspose=False, norm_float16=False, num_splits=1, dim_split=1, save_mem=False,
    )  # fmt: skip
    return model, (torch.randn(1, 1, 32, 32, 32),)


def _autoencoder() -> tuple[nn.Module, tuple[Any, ...]]:
    model = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, channels=(16, 32),
        num_res_blocks=(1, 1), norm_num_groups=16, attention_levels=(False, True),
    )  # fmt: skip
    return model, (torch.randn(1, 1, 32, 32, 32),)


def _downsampling() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Conv3d(32, 64, 2, 2), (torch.randn(2, 32, 32, 32, 32),)


CASES = (
    Case("ViT conv", lambda: _vit("conv")),
    Case("ViT perceptron", lambda: _vit("perceptron")),
    Case("UNETR", _unetr),
    Case("MaskedAutoEncoderViT", _masked_autoencoder),
    Case("DiffusionModelUNet", lambda: _diffusion(conditioned=False)),
    Case("DiffusionModelUNet, cross-attention", lambda: _diffusion(conditioned=True)),
    Case("AutoencoderKlMaisi", _maisi, torch.float32),  # its norms cannot do float64; it has no kinks
    Case("AutoencoderKL", _autoencoder),
    Case("Conv3d 32->64, kernel = stride = 2", _downsampling),
)


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for item in result for tensor in _tensors(item)]


def run(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs, with a graph; models that draw random numbers draw the same at every call."""
    torch.manual_seed(0)
    return _tensors(model(*inputs))


def outputs_and_gradients(model: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """Outputs, and the gradients of their mean square by the parameters."""
    model.zero_grad(set_to_none=True)
    outputs = run(model, inputs)
    torch.stack([output.square().mean() for output in outputs if output.requires_grad]).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [item.detach().clone() for item in (*outputs, *gradients)]


def relative_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest of all tensors, each relative to its largest value."""
    return max(
        (a - b).abs().max().item() / max(a.abs().max().item(), 1e-3)
        for a, b in zip(expected, found, strict=True)
    )


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, with the device's work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def benchmark(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """One row of the table.

    Raises:
        AssertionError: outputs, gradients or names of the state dict differ.
    """
    torch.manual_seed(0)
    before, inputs = case.build()
    before = before.to(device).eval()
    inputs = tuple(item.to(device) for item in inputs)
    after = copy.deepcopy(before)
    swaps = accelerate(after)
    if list(before.state_dict()) != list(after.state_dict()):
        raise AssertionError(f"{case.name}: names of the state dict changed")
    wide = [
        item.to(case.check) if isinstance(item, Tensor) and item.is_floating_point() else item
        for item in inputs
    ]
    gradients = relative_difference(
        *(outputs_and_gradients(copy.deepcopy(model).to(case.check), wide) for model in (before, after))
    )
    if not gradients < TOLERANCES[case.check]:
        raise AssertionError(f"{case.name}: off by {gradients:.2g} of the largest value")
    with torch.no_grad():
        outputs = relative_difference(run(before, inputs), run(after, inputs))

    def forward(model: nn.Module) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                run(model, inputs)

        return call

    ratios: dict[str, list[float]] = {"forward": [], "forward_backward": []}
    for name, wrap in (
        ("forward", forward),
        ("forward_backward", lambda model: lambda: outputs_and_gradients(model, inputs)),
    ):
        calls = wrap(before), wrap(after)
        for call in calls:
            call()
        for _ in range(repeats):
            slow, fast = (seconds(call, device) for call in calls)
            ratios[name].append(slow / fast)
    return {
        "model": case.name,
        "inputs": [list(item.shape) for item in inputs],
        "swaps": dict(Counter(swap.before.rpartition(".")[2] for swap in swaps)),
        "difference_float32_outputs": outputs,
        "difference_checked": {"dtype": str(case.check), "outputs_and_gradients": gradients},
        **{f"speed_ratio_{name}": round(statistics.median(values), 3) for name, values in ratios.items()},
        "ratios": ratios,
    }


def provenance(device: torch.device) -> dict[str, str]:
    """Where and with what the figures were made."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    on_cpu = device.type == "cpu"
    return {
        "device": platform.processor() or platform.machine()
        if on_cpu
        else torch.cuda.get_device_name(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "monai": monai.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--repeats", type=int, default=7, help="pairs of measurements per model")
    parser.add_argument("--only", nargs="+", default=[], help="models whose name contains one of these")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()

    chosen = [
        case for case in CASES if not arguments.only or any(part in case.name for part in arguments.only)
    ]
    rows = []
    for case in chosen:
        row = benchmark(case, arguments.device, arguments.repeats)
        rows.append(row)
        swaps = ", ".join(f"{count} {name}" for name, count in row["swaps"].items())
        print(
            f"{row['model']:36s} {row['speed_ratio_forward']:6.2f} x forward  "
            f"{row['speed_ratio_forward_backward']:6.2f} x with backward  "
            f"off by {row['difference_float32_outputs']:.0e}, "
            f"{row['difference_checked']['outputs_and_gradients']:.0e} {row['difference_checked']['dtype']}  "
            f"{row['inputs'][0]}  {swaps}",
            flush=True,
        )
    where = provenance(arguments.device)
    print("float32;", where)
    if arguments.json:
        arguments.json.write_text(json.dumps({"models": rows, **where}, indent=1) + "\n")


if __name__ == "__main__":
    main()
