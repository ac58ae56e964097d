"""Passes of the network, encoding and decoding, beside PyTorch's TransformerEncoder and MONAI's ViT layers.

``python -m benchmarks.bench_model [--device cpu] [--quick] [--json PATH]``

Peers get our weights, and are timed only if they then give our outputs and gradients. Ours is timed with its
blocks compiled, as the strongest peer is. bfloat16 is by autocast, with float32 weights. MONAI's layers use
its fused attention.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from meduet_fast.kernels.verify import FACTOR
from meduet_fast.models import MeDUET
from meduet_fast.models.blocks import Block

from .command import cases_command
from .harness import Case, Variant, not_importable
from .published_step import relative
from .step_parts import SMALL, VIT_BASE, Setting, make_batch, make_models
from .tables import OURS

Layers = Callable[[Sequence[Block]], nn.ModuleList]
ENCODER, DECODER = "encoder", "decoder"
GATE_BATCH = 2
FLOAT32_TOLERANCE = 1e-4  # of outputs and gradients, relative


class OurEmbedding(nn.Module):
    """Crops (B, C, S, S, S) -> tokens (B, 1+L, D)."""

    def __init__(self, model: MeDUET) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        return self.model.embed(latents)


class Embedding(nn.Module):
    """Crops to tokens by a Conv3d, with our weights."""

    positions: Tensor

    def __init__(self, model: MeDUET) -> None:
        super().__init__()
        self.proj, self.cls_token = model.embed_layer.proj, model.cls_token
        self.register_buffer("positions", model.pos_embed)

    def forward(self, latents: Tensor) -> Tensor:
        tokens = F.conv3d(latents, self.proj.weight, self.proj.bias, stride=self.proj.patch_size)
        tokens = tokens.flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype)
        return torch.cat([cls, tokens], 1) + self.positions


class TorchLayer(nn.TransformerEncoderLayer):
    """The compiler passes over forward methods of PyTorch's own classes unless something else calls them."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def torch_layers(blocks: Sequence[Block]) -> nn.ModuleList:
    """PyTorch's pre-norm layers with the weights of ours."""
    layers = nn.ModuleList()
    for block in blocks:
        width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
        layer = TorchLayer(
            width, block.attn.num_heads, hidden, dropout=0.0, activation="gelu",
            layer_norm_eps=block.norm1.eps, batch_first=True, norm_first=True,
        )  # fmt: skip
        attention = layer.self_attn
        pairs = ((layer.norm1, block.norm1), (layer.norm2, block.norm2), (layer.linear1, block.mlp.fc1))
        for own, other in (*pairs, (layer.linear2, block.mlp.fc2), (attention.out_proj, block.attn.proj)):
            own.load_state_dict(other.state_dict())
        with torch.no_grad():
            attention.in_proj_weight.copy_(block.attn.qkv.weight)
            attention.in_proj_bias.copy_(block.attn.qkv.bias)
        layers.append(layer)
    return layers


def monai_layers(blocks: Sequence[Block]) -> nn.ModuleList:
    """MONAI's transformer blocks, those of its ViT, with the weights of ours.

    Raises:
        ImportError: if MONAI is not installed.
    """
    from monai.networks.blocks import TransformerBlock

    layers = nn.ModuleList()
    for block in blocks:
        width, hidden = block.mlp.fc1.in_features, block.mlp.fc1.out_features
        layer = TransformerBlock(width, hidden, block.attn.num_heads, qkv_bias=True, use_flash_attention=True)
        pairs = ((layer.norm1, block.norm1), (layer.norm2, block.norm2), (layer.mlp.linear1, block.mlp.fc1))
        others = ((layer.mlp.linear2, block.mlp.fc2), (layer.attn.out_proj, block.attn.proj))
        for own, other in (*pairs, *others, (layer.attn.qkv, block.attn.qkv)):
            own.load_state_dict(other.state_dict())
        layer.norm1.eps = layer.norm2.eps = block.norm1.eps
        layers.append(layer)
    return layers


def our_layers(blocks: Sequence[Block]) -> nn.ModuleList:
    """Copies, so that they can be compiled on their own."""
    return nn.ModuleList(copy.deepcopy(block) for block in blocks)


class Network(nn.Module):
    """What comes before the transformer blocks, the blocks, what comes after."""

    def __init__(self, before: nn.Module, layers: nn.ModuleList, after: nn.Module) -> None:
        super().__init__()
        self.before, self.layers, self.after = before, layers, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for layer in self.layers:
            x = layer(x)
        return self.after(x)


def network(model: MeDUET, part: str, layers: Layers) -> Network:
    """The encoder with its embedding, or the decoder's blocks with its prediction."""
    if part == DECODER:
        blocks = [block for block in model.decoder_blocks if isinstance(block, Block)]
        after: nn.Module = nn.Sequential(model.decoder_norm, model.decoder_pred)
        return Network(nn.Identity(), layers(blocks), after)
    blocks = [block for block in model.blocks if isinstance(block, Block)]
    before = OurEmbedding(model) if layers is our_layers else Embedding(model)
    return Network(before, layers(blocks), model.norm)


def _autocast(x: Tensor, low: bool) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=low)


def results(run: Network, x: Tensor, low: bool) -> dict[str, Tensor]:
    """The output and its gradient with respect to the input, which has come through every layer."""
    x = x.detach().requires_grad_()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=low):
        with _autocast(x, low):
            output = run(x)
        incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.device)
        (gradient,) = torch.autograd.grad((output.float() * incoming).sum(), x)
    return {"output": output.detach().float(), "gradient": gradient.float()}


def require(found: dict[str, Tensor], truth: dict[str, Tensor], rough: dict[str, Tensor] | None) -> None:
    """Refuse what errs more than 1e-4, or than three times what ours does in bfloat16 (``rough``).

    Raises:
        AssertionError: naming what does.
    """
    for name, expected in truth.items():
        error, allowed = relative(found[name], expected), FLOAT32_TOLERANCE
        if rough is not None:
            allowed = FACTOR * (relative(rough[name], expected) + torch.finfo(torch.bfloat16).eps)
        if not error <= allowed:
            raise AssertionError(f"{name} is off by {error:.3g}, allowed {allowed:.3g}")


def variants(model: MeDUET, part: str, x: Tensor, both: bool) -> list[Variant]:
    """Ours and the peers on ``x``, forward alone or with backward; bfloat16 on CUDA."""
    low, few = x.is_cuda, x[:GATE_BATCH]
    plain = network(model, part, our_layers).to(x.device)
    truth = results(plain, few, low=False)
    rough = results(plain, few, low=True) if low else None

    def variant(name: str, layers: Layers, compiled: bool) -> Variant:
        try:
            run = network(model, part, layers).to(x.device)
        except ImportError as error:
            return Variant(name, unavailable=not_importable(error))
        if compiled:
            for layer in run.layers:
                layer.compile(fullgraph=True, dynamic=True)
        parameters = list(run.parameters())

        def call() -> object:
            with torch.set_grad_enabled(both), _autocast(x, low):
                output = run(x)
            if not both:
                return output
            # Of the embedding's model only some parameters are used.
            return torch.autograd.grad(output.float().sum(), parameters, allow_unused=True)

        return Variant(name, call, lambda: require(results(run, few, low), truth, rough))

    return [
        variant(OURS, our_layers, True),
        variant(f"{OURS}, not compiled", our_layers, False),
        variant("TransformerEncoder, compiled", torch_layers, True),
        variant("TransformerEncoder", torch_layers, False),
        variant("MONAI", monai_layers, False),
    ]


def pass_case(setting: Setting, part: str, batch: int, both: bool, device: torch.device) -> Case:
    """One pass over one size of batch; the decoder gets four sequences a sample, as in the step."""
    config = setting.model

    def build() -> list[Variant]:
        torch.compiler.reset()
        model, _ = make_models(config, device)
        if part == DECODER:
            generator = torch.Generator(device).manual_seed(0)
            size = (4 * batch, 1 + config.num_tokens, config.decoder_embed_dim)
            x = torch.randn(size, generator=generator, device=device)
        else:
            x, _, _ = make_batch(config, batch, device)
        return variants(model, part, x, both)

    return Case(
        bench="model",
        name=f"{setting.name} {part} B={batch}",
        dtype="bfloat16" if device.type == "cuda" else "float32",
        direction="forward_backward" if both else "forward",
        shape={"batch": batch, "tokens": config.num_tokens},
        bytes=None,
        flops=batch * pass_flops(setting, part, both),
        build=build,
        per_call={"samples": batch},
    )


@functools.cache
def pass_flops(setting: Setting, part: str, both: bool) -> int:
    """FLOPs for one sample, of our pass; the gradient of the input is not asked for."""
    config = setting.model
    with torch.device("meta"):
        run = network(MeDUET(config), part, our_layers)
        if part == DECODER:
            x = torch.empty(4, 1 + config.num_tokens, config.decoder_embed_dim)
        else:
            x = torch.empty(1, config.in_channels, *[config.latent_size] * 3)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(both):
        output = run(x)
        if both:
            output.sum().backward()
    return counter.get_total_flops()


def cases(device: torch.device, quick: bool) -> list[Case]:
    """Encoder and decoder, forward and with backward: ViT-B on CUDA, a small network on the CPU."""
    gpu = device.type == "cuda"
    setting = VIT_BASE if gpu else SMALL
    batches = ((64,) if gpu else (4,)) if quick else (64, 16, 256) if gpu else (2, 4, 8)
    parts = (ENCODER,) if quick else (ENCODER, DECODER)
    return [
        pass_case(setting, part, batch, both, device)
        for batch in batches
        for part in parts
        for both in (False, True)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    return cases_command(cases, __doc__ or "", arguments)


if __name__ == "__main__":
    sys.exit(main())
