"""Every tensor that the published code produced, from the same weights and inputs (fp32), by every backend.

On a CPU that is plain PyTorch, and the Triton kernels when they are interpreted
(``tests/kernels/test_interpreter.py``); where there is a GPU, both on the GPU as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from meduet_fast.kernels import build_mix_index, quadruplet_contrast, set_kernel_backend
from meduet_fast.kernels.backend import interpreted
from meduet_fast.kernels.contrast import Identity
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.models.blocks import sincos_positions
from meduet_fast.pretraining import ObjectiveConfig, pretraining_losses

GOLDEN = Path(__file__).parents[1] / "golden" / "meduet_reference_tiny.safetensors"
LOSSES = ("reconstruction", "domain_content", "domain_style", "mftd", "siqc", "total")


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class Golden:
    def __init__(self, device: str) -> None:
        with safe_open(GOLDEN, "pt", device) as file:
            self.settings = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        names = MeDUETConfig.__dataclass_fields__
        self.config = MeDUETConfig(**{key: value for key, value in self.settings.items() if key in names})

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def model(self, name: str) -> MeDUET:
        model = MeDUET.from_reference(self.under(f"{name}/"), self.config)
        return model.to(self["input/x"].device)


VARIANTS = [("triton", "cpu")] if interpreted() else [("eager", "cpu")]
if torch.cuda.is_available():
    VARIANTS += [("eager", "cuda"), ("triton", "cuda")]


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    backend, device = request.param
    set_kernel_backend(backend)
    yield Golden(device)
    set_kernel_backend("auto")


def halves(x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Compacted tokens of both sources, as the published code holds them."""
    first, second = torch.gather(x, 1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1])).chunk(2, 1)
    return first, second


@torch.no_grad()
def test_intermediates(golden: Golden) -> None:
    student, teacher, latents = golden.model("student"), golden.model("teacher"), golden["input/x"]
    index = build_mix_index(golden["input/mask"])
    mixed = student.factorize(student.encode(student.embed(latents, index.mask)), index)
    predicted = student.decode(mixed, index).tokens
    full = student(latents)
    complement = index.complement()
    taught = teacher.factorize(teacher.encode(teacher.embed(latents, complement.mask)), complement)
    content, style = halves(mixed.content, index.order), halves(mixed.style, index.order)
    found = {
        "cls": mixed.cls,
        "content_1": content[0],
        "content_2": content[1],
        "style_1": style[0],
        "style_2": style[1],
        "x_rec": predicted[:8],
        "x_rec_swapped": predicted[8:],
        "encode_full_cls": full.cls,
        "encode_full_content": full.content,
        "encode_full_style": full.style,
        "teacher_content_1": halves(taught.content, complement.order)[0],
        "teacher_style_2": halves(taught.style, complement.order)[1],
    }
    expected = golden.under("out/")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        assert relative(tensor, expected[name]) < 1e-5, name


def test_losses_and_every_gradient(golden: Golden) -> None:
    student, teacher = golden.model("student"), golden.model("teacher")
    config = ObjectiveConfig(
        pairing="reference",
        **{key: value for key, value in golden.settings.items() if key.startswith("lambda")},
    )
    inputs = golden["input/x"], golden["input/domain"], golden["input/mask"]
    losses = pretraining_losses(student, teacher, *inputs, config)
    assert tuple(losses) == LOSSES
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(golden[f"loss/{name}"].item(), rel=1e-5), name
    losses["total"].backward()
    expected = golden.under("grad/")
    found = {name: item.grad for name, item in student.named_parameters() if name != "siqc_log_scale"}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        assert relative(gradient, expected[name]) < 1e-4, name
    scales = torch.stack([golden["grad_siqc/logit_scale_c"], golden["grad_siqc/logit_scale_s"]])
    assert student.siqc_log_scale.grad is not None
    assert relative(student.siqc_log_scale.grad, scales) < 1e-4
    assert all(item.grad is None for item in teacher.parameters())


@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("identity", ["content", "style"])
def test_contrast_alone(golden: Golden, case: int, identity: Identity) -> None:
    query = golden[f"contrast{case}/q"].requires_grad_()
    log_scale = torch.tensor(1 / 0.07, device=query.device).log().requires_grad_()
    loss = quadruplet_contrast(query, golden[f"contrast{case}/k"], log_scale, identity)
    loss.backward()
    assert loss.item() == pytest.approx(golden[f"contrast{case}/{identity}_loss"].item(), rel=1e-5)
    assert query.grad is not None
    assert log_scale.grad is not None
    assert relative(query.grad, golden[f"contrast{case}/{identity}_grad_q"]) < 1e-4
    assert relative(log_scale.grad, golden[f"contrast{case}/{identity}_grad_logit_scale"]) < 1e-4
    query.grad = None
    query.requires_grad_(False)


def test_positions(golden: Golden) -> None:
    assert torch.equal(sincos_positions(48, 4), golden["student/pos_embed"].cpu())
    assert torch.equal(sincos_positions(24, 4), golden["student/decoder_pos_embed"].cpu())


def test_checkpoint_round_trip(golden: Golden) -> None:
    state = golden.under("student/")
    extended = {f"module.{key}": value for key, value in state.items()}
    extended["module.patch_embed.proj.weight"] = torch.zeros(48, 3, 16, 16)  # dead in the published code
    written = MeDUET.from_reference(extended, golden.config).to_reference()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) for key in state)
    assert {key: tuple(value.shape) for key, value in written.items()} == {
        key: tuple(value.shape) for key, value in state.items()
    }


def test_sizes_are_read_off_the_weights(golden: Golden) -> None:
    heads = golden.config.num_heads, golden.config.decoder_num_heads
    assert MeDUETConfig.from_state_dict(golden.under("student/"), {}, *heads) == golden.config
    with pytest.raises(ValueError, match=r"48 wide .* 24 wide .*: give num_heads= and decoder_num_heads="):
        MeDUETConfig.from_state_dict(golden.under("student/"))
    published = MeDUET(MeDUETConfig(depth=1, decoder_depth=1))
    assert MeDUET.from_reference(published.to_reference()).config == published.config


def test_wrong_state_dicts_are_refused_by_name(golden: Golden) -> None:
    state = golden.under("student/")
    with pytest.raises(ValueError, match=r"1 missing: norm\.bias"):
        MeDUET.from_reference(
            {key: value for key, value in state.items() if key != "norm.bias"}, golden.config
        )
    with pytest.raises(ValueError, match=r"1 unexpected: extra\.weight"):
        MeDUET.from_reference({**state, "extra.weight": torch.zeros(1)}, golden.config)
    with pytest.raises(ValueError, match=r"norm\.bias has shape \(47,\), expected \(48,\)"):
        MeDUET.from_reference({**state, "norm.bias": torch.zeros(47)}, golden.config)
    with pytest.raises(ValueError, match=r"'embed_layer\.proj\.weight' is missing"):
        MeDUET.from_reference({"weight": torch.zeros(1)})
