"""Models of MONAI and diffusers before and after ``accelerate``: same numbers, time of forward and backward.

``python -m benchmarks.bench_accelerate [--device cpu] [--quick] [--only NAME] [--json PATH]``

Each model is built twice with the same weights, one of the two is accelerated, and both get the same input.
No time is taken before outputs and gradients agree, in float64: in float32 a rounding that carries one value
across the kink of a LeakyReLU shifts gradients by up to a percent, with the original model as with ours. Both
take turns in float32, by the wall clock.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from meduet_fast.layers import accelerate

from .command import cases_command
from .harness import Case, Variant, not_importable
from .operations import BOTH, FORWARD
from .tables import OURS

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


class Example(NamedTuple):
    """One model.

    Attributes:
        name: for tables.
        build: the model, and its inputs on the CPU.
        check: dtype in which outputs and gradients are compared.
        quick: whether it is among the few of a quick run.
    """

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    check: torch.dtype = torch.float64
    quick: bool = False


def _vit(proj_type: str) -> tuple[nn.Module, tuple[Any, ...]]:
    from monai.networks.nets import ViT

    model = ViT(
        in_channels=1, img_size=(48, 48, 48), patch_size=8, hidden_size=192, mlp_dim=384, num_layers=4,
        num_heads=6, proj_type=proj_type, pos_embed_type="learnable",
    )  # fmt: skip
    return model, (torch.randn(2, 1, 48, 48, 48),)


def _unetr() -> tuple[nn.Module, tuple[Any, ...]]:
    from monai.networks.nets import UNETR

    model = UNETR(
        in_channels=1, out_channels=4, img_size=(48, 48, 48), feature_size=8, hidden_size=192, mlp_dim=384,
        num_heads=6, proj_type="conv",
    )  # fmt: skip
    return model, (torch.randn(1, 1, 48, 48, 48),)


def _masked_autoencoder() -> tuple[nn.Module, tuple[Any, ...]]:
    from monai.networks.nets import MaskedAutoEncoderViT

    model = MaskedAutoEncoderViT(
        in_channels=1, img_size=48, patch_size=8, hidden_size=192, mlp_dim=384, num_layers=4, num_heads=6,
        decoder_hidden_size=96, decoder_mlp_dim=192, decoder_num_layers=2, decoder_num_heads=6,
    )  # fmt: skip
    return model, (torch.randn(2, 1, 48, 48, 48),)


def _diffusion(conditioned: bool) -> tuple[nn.Module, tuple[Any, ...]]:
    from monai.networks.nets import DiffusionModelUNet

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
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    model = AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, num_channels=(16, 32, 32),
        num_res_blocks=(1, 1, 1), norm_num_groups=16, norm_eps=1e-6, attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False, use_checkpointing=False,
        use_convtranspose=False, norm_float16=False, num_splits=1, dim_split=1, save_mem=False,
    )  # fmt: skip
    return model, (torch.randn(1, 1, 32, 32, 32),)


def _autoencoder() -> tuple[nn.Module, tuple[Any, ...]]:
    from monai.networks.nets import AutoencoderKL

    model = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, channels=(16, 32),
        num_res_blocks=(1, 1), norm_num_groups=16, attention_levels=(False, True),
    )  # fmt: skip
    return model, (torch.randn(1, 1, 32, 32, 32),)


def _swin() -> tuple[nn.Module, tuple[Any, ...]]:
    from monai.networks.nets.swin_unetr import SwinTransformer

    model = SwinTransformer(
        in_chans=1, embed_dim=12, window_size=(7, 7, 7), patch_size=(2, 2, 2), depths=(2, 1, 1, 1),
        num_heads=(3, 3, 3, 3), spatial_dims=3,
    )  # fmt: skip
    return model, (torch.randn(1, 1, 32, 32, 32),)


class _Tensors(nn.Module):
    """A model of diffusers that gives plain tensors, with some arguments fixed."""

    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.model, self.fixed = model, fixed
        for parameter in model.parameters():
            # Last layers that start as zeros would hide differences.
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)

    def forward(self, *inputs: Any) -> Any:
        return self.model(*inputs, return_dict=False, **self.fixed)


def _diffusers_unet() -> tuple[nn.Module, tuple[Any, ...]]:
    from diffusers import UNet3DConditionModel

    model = UNet3DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    return _Tensors(model), (torch.randn(1, 4, 4, 16, 16), torch.tensor([10]), torch.randn(1, 4, 16))


def _video_unet() -> tuple[nn.Module, tuple[Any, ...]]:
    from diffusers import UNetSpatioTemporalConditionModel

    model = UNetSpatioTemporalConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        num_attention_heads=(2, 2), cross_attention_dim=16, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip
    inputs = (torch.randn(1, 4, 4, 16, 16), torch.tensor([10]), torch.randn(1, 1, 16), torch.rand(1, 3))
    return _Tensors(model), inputs


def _diffusers_autoencoder(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    import diffusers

    plain = {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 8, "layers_per_block": 1,
    }  # fmt: skip
    options: dict[str, Any] = {
        "AutoencoderKLTemporalDecoder": {
            "latent_channels": 4, "block_out_channels": (32, 32), "layers_per_block": 1,
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        },
        "AutoencoderKLMochi": {
            "latent_channels": 4, "encoder_block_out_channels": (32,) * 4, "layers_per_block": (1,) * 5,
            "decoder_block_out_channels": (32,) * 4,
        },
    }.get(name, plain)  # fmt: skip
    model = getattr(diffusers, name)(**options)
    if name == "AutoencoderKLTemporalDecoder":
        return _Tensors(model, num_frames=2), (torch.randn(2, 3, 16, 16),)
    frames = 7 if name == "AutoencoderKLMochi" else 5
    return _Tensors(model), (torch.randn(1, 3, frames, 32, 32),)


def _downsampling() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Conv3d(32, 64, 2, 2), (torch.randn(2, 32, 32, 32, 32),)


EXAMPLES = (
    Example("ViT conv", lambda: _vit("conv"), quick=True),
    Example("ViT perceptron", lambda: _vit("perceptron")),
    Example("UNETR", _unetr),
    Example("MaskedAutoEncoderViT", _masked_autoencoder),
    Example("DiffusionModelUNet", lambda: _diffusion(conditioned=False), quick=True),
    Example("DiffusionModelUNet, cross-attention", lambda: _diffusion(conditioned=True)),
    Example("AutoencoderKlMaisi", _maisi, torch.float32),  # its norms cannot do float64; it has no kinks
    Example("AutoencoderKL", _autoencoder),
    Example("SwinTransformer", _swin),
    Example("UNet3DConditionModel", _diffusers_unet),
    Example("UNetSpatioTemporalConditionModel", _video_unet),
    *(
        Example(name, partial(_diffusers_autoencoder, name))
        for name in (
            "AutoencoderKLTemporalDecoder",
            "AutoencoderKLMagvit",
            "AutoencoderKLCogVideoX",
            "AutoencoderKLHunyuanVideo",
            "AutoencoderKLMochi",
        )
    ),
    Example("Conv3d 32->64, kernel = stride = 2", _downsampling, quick=True),
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


def make_pair(example: Example, device: torch.device) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """The model, the same accelerated, and inputs.

    Raises:
        AssertionError: names of the state dict changed.
        ImportError: MONAI or diffusers is not installed.
    """
    torch.manual_seed(0)
    before, inputs = example.build()
    before = before.to(device).eval()
    after = copy.deepcopy(before)
    accelerate(after)
    if list(before.state_dict()) != list(after.state_dict()):
        raise AssertionError("names of the state dict changed")
    return before, after, tuple(item.to(device) for item in inputs)


@cache
def check(example: Example, device: torch.device) -> None:
    """Raises: AssertionError if outputs, gradients or names of the state dict differ."""
    before, after, inputs = make_pair(example, device)
    wide = [item.to(example.check) if item.is_floating_point() else item for item in inputs]
    found = [outputs_and_gradients(model.to(example.check), wide) for model in (before, after)]
    difference = relative_difference(*found)
    if not difference < TOLERANCES[example.check]:
        raise AssertionError(f"off by {difference:.2g} of the largest value")


def _variants(example: Example, device: torch.device, direction: str) -> list[Variant]:
    try:
        before, after, inputs = make_pair(example, device)
    except ImportError as error:
        return [Variant(OURS, unavailable=not_importable(error))]

    def forward(model: nn.Module) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> object:
            return run(model, inputs)

        return call

    def both(model: nn.Module) -> Callable[[], object]:
        return lambda: outputs_and_gradients(model, inputs)

    wrap = both if direction == BOTH else forward
    return [Variant(OURS, wrap(after), lambda: check(example, device)), Variant("original", wrap(before))]


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Every model, forward and with backward."""
    for example in EXAMPLES:
        for direction in (FORWARD, BOTH) if example.quick or not quick else ():
            yield Case(
                bench="accelerate",
                name=example.name,
                dtype="float32",
                direction=direction,
                shape={},
                bytes=None,
                flops=None,
                build=partial(_variants, example, device, direction),
                clock="wall",
                names=(OURS, "original"),
            )


def test_accelerate(benchmark: Any, variant: Variant) -> None:
    benchmark(variant.call)


if __name__ == "__main__":
    sys.exit(cases_command(cases, __doc__ or ""))
