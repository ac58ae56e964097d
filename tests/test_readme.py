"""What README and docs say to type is typed here: Python runs, commands parse, options exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nibabel.nifti1 import Nifti1Image, save
from torch import nn
from torch.distributed.run import get_args_parser

from meduet_fast.autoencoder import load_tokenizer
from meduet_fast.cli import COMMANDS, _parse, main, split_command
from meduet_fast.data.store_writer import StoreWriter, VolumeRecord
from meduet_fast.errors import UserError
from meduet_fast.models import MeDUET, MeDUETConfig
from meduet_fast.pretraining import PretrainConfig
from meduet_fast.synthesis.config import SynthesisConfig, TransformerConfig
from meduet_fast.synthesis.factors import FactorsConfig, write_factors
from meduet_fast.synthesis.train import train_synthesis

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
# A UNETR has 12 blocks and takes patches that divide 16.
CONFIG = MeDUETConfig(
    latent_size=8, patch_size=4, embed_dim=24, depth=12, num_heads=2, decoder_embed_dim=12, decoder_depth=1,
    decoder_num_heads=2, num_domains=3,
)  # fmt: skip


def python_blocks(page: Path) -> Iterator[str]:
    """Yield what stands between ```python and ```, below as many empty lines as there are before it."""
    text = page.read_text(encoding="utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield "\n" * text.count("\n", 0, block.start(1)) + block[1]


def shell_commands(page: Path) -> list[list[str]]:
    """Return the ``meduet-fast`` lines of blocks of shell, in words."""
    text = page.read_text(encoding="utf-8")
    commands = []
    for block in re.findall(r"^```(?:sh|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for variable, value in re.findall(r"^for (\w+) in (\S+)", block, re.MULTILINE):
            block = block.replace(f"${variable}", value)
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["meduet-fast"]:
                commands.append(words[1:])
    return commands


def mentioned_commands(page: Path) -> list[list[str]]:
    """Return the ``meduet-fast`` commands within a text, in words, perhaps without what they require."""
    text = page.read_text(encoding="utf-8")
    spans = re.findall(
        r"`meduet-fast ([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    )
    return [[word for word in shlex.split(span) if word != "..."] for span in spans]


def refusal(words: list[str]) -> str:
    """Parse a command as the program does, and as torchrun what goes to it; return why it is refused."""
    configs = [words[place - 1] == "--config" and word == "NAME" for place, word in enumerate(words)]
    words = ["demo" if config else word for word, config in zip(words, configs, strict=True)]
    name, arguments = split_command(words)
    if name == "launch":
        launched = get_args_parser().parse_args(arguments)
        name, arguments = split_command([launched.training_script, *launched.training_script_args])
    if name not in COMMANDS:
        return f"no command {name}"
    try:
        with suppress(SystemExit):  # of --help
            _parse(name, arguments)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    assert [(words, why) for words in shell_commands(page) if (why := refusal(words))] == []
    mentioned = [(words, why) for words in mentioned_commands(page) if (why := refusal(words))]
    incomplete = "the following arguments are required"
    assert [(words, why) for words, why in mentioned if not why.startswith(incomplete)] == []


def test_commands_are_found() -> None:
    assert ["report", "RUN"] in shell_commands(README)
    assert ["sizes"] in mentioned_commands(README)
    [own] = [words for words in shell_commands(ROOT / "docs" / "scaling.md") if words[0] == "pretrain"]
    assert own[own.index("--precision") :][:4] == ["--precision", "bfloat16", "--steps", "300"]
    wrong = ["launch", "--nproc-per-node", "8", "pretrain", "--stepz", "3"]
    assert refusal(wrong) == "unrecognized arguments: --stepz 3"
    assert refusal(["repotr", "RUN"]) == "no command repotr"


def test_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Each ``--option`` of the text is one of some command of ours, or of torchrun."""
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    known.add("--signal")  # of SLURM
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        known.update(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    for page in PAGES:
        said = set(re.findall(r"`(--[a-z][\w.-]*)", page.read_text(encoding="utf-8")))
        assert said - known == set(), page.name


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which README's RUN, STORE, SCANS and checkpoint are, small."""
    monkeypatch.chdir(tmp_path)
    Path("SCANS").mkdir()
    voxels = np.random.default_rng(0).uniform(-100, 200, (40, 32, 36)).astype(np.float32)
    save(Nifti1Image(voxels, np.diag([1.5, 1.5, 1.5, 1.0])), "SCANS/scan.nii.gz")
    identity = load_tokenizer().identity
    with StoreWriter(
        Path("STORE"), tokenizer=identity, tokenizer_spec="builtin", channels=4, compression=4
    ) as store:
        volume = VolumeRecord(
            name="NAME", domain="a", body_part="none", content_key="a", source="a", affine=np.eye(4),
            latent=torch.randn(4, 9, 8, 10), spacing=(1.5, 1.5, 1.5), intensity={},
        )  # fmt: skip
        store.add(volume)
    torch.manual_seed(0)
    model = MeDUET(CONFIG)
    checkpoint = Path("RUN/checkpoints/200000")
    checkpoint.mkdir(parents=True)
    model.save_pretrained(checkpoint / "teacher.safetensors")
    torch.save({"model": model.to_reference()}, "checkpoint_4999.pth")
    record = {"config": asdict(PretrainConfig()), "data": str(Path("STORE").resolve()), "step": 200000}
    for folder in (checkpoint, Path("RUN")):
        (folder / "run.json").write_text(json.dumps(record))
    factors = Path("factors.safetensors")
    write_factors("RUN", "STORE", factors, FactorsConfig(device="cpu"))
    sizes = TransformerConfig(CONFIG.patch_size, hidden_size=12, depth=1, num_heads=2)
    settings = SynthesisConfig(steps=1, workers=0, device="cpu", transformer=sizes)
    train_synthesis(Path("STORE"), factors, Path("SYNTHESIS"), settings)
    return tmp_path


def test_python_runs_as_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One block after the other, as in one session, after the commands that the text puts before them."""
    for words in [*shell_commands(README), *mentioned_commands(README)]:
        if words[0] in ("encode", "export") and "RUN" in words:
            assert main(words) == 0, words
    session_of: dict[str, dict[str, Any]] = {}
    for page in PAGES:
        session: dict[str, Any] = {"__name__": "__main__"}
        for block in python_blocks(page):
            exec(compile(block, page.name, "exec", dont_inherit=True), session)
        session_of[page.name] = session
    readme = session_of["README.md"]
    printed = capsys.readouterr().out
    assert "scan torch.Size([2, 2, 2, 24])" in printed
    assert "Swap(path='blocks.11.attn', before='monai.networks.blocks.selfattention.SABlock'" in printed

    assert session_of["synthesis.md"]["image"].shape == (32, 32, 32)
    assert readme["style"].shape == (1, 6)
    assert readme["tokens"].shape == (2, 2, 2, 6)
    assert readme["factors"].content.shape == (1, 8, 24)
    assert torch.equal(readme["published"].cls_token, readme["model"].cls_token)
    model, latents, vit = readme["model"], readme["latents"], readme["vit"]
    expected = model.encode(model.embed(latents))
    torch.testing.assert_close(readme["encoded"], expected, rtol=1e-5, atol=1e-5)
    readme["set_eps"](vit, nn.LayerNorm(1).eps)
    with torch.no_grad():
        assert (vit.norm(vit(latents)[1][-1]) - expected).abs().max() > 1e-5
    assert readme["logits"].shape == (1, 2, 32, 32, 32)
    assert torch.equal(readme["unetr"].vit.norm.weight, model.norm.weight)
