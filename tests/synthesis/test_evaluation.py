"""The command that evaluates runs: what it opens, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from meduet_fast.errors import UserError
from meduet_fast.synthesis.evaluation import evaluate, open_pipeline
from meduet_fast.synthesis.factors import FactorsConfig, FactorTable, write_factors
from meduet_fast.synthesis.judge import EvaluateConfig
from meduet_fast.synthesis.pipeline import MeDUETPipeline

from .material import Volumes, write_run, write_store
from .pipelines import make_network, make_parts, make_run

GRIDS: Volumes = {"a0": ("a", (16, 8, 8)), "b0": ("b", (16, 8, 8)), "c0": ("c", (16, 8, 6))}
CONFIG = EvaluateConfig(samples=6, decoded=2, scales=((1.0, 1.0),), device="cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of imported latents, its table, and what two runs remember of both."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_store(folder / "store", GRIDS, tokenizer="reference-cache")
    pretrained = write_run(folder / "pretrained", folder / "store")
    write_factors(
        pretrained, folder / "store", folder / "table", FactorsConfig(window=4, stride=2, device="cpu")
    )
    for name in ("scratch", "transferred"):
        (folder / name).mkdir()
        record = {
            "data": str(folder / "store"), "config": {"held_out_fraction": 0.4},
            "factors": str(folder / "table"), "factors_identity": FactorTable.open(folder / "table").identity,
        }  # fmt: skip
        (folder / name / "run.json").write_text(json.dumps(record))
    return folder


def open_noise(run: Path, table: FactorTable, config: EvaluateConfig) -> Any:
    """Noise by the seed of each crop."""

    def sample(content: Sequence[int], style: Any, scales: Any, seeds: Sequence[int]) -> Tensor:
        drawn = [
            torch.randn(4, *table.window, generator=torch.Generator().manual_seed(seed)) for seed in seeds
        ]
        return torch.stack(drawn)

    return sample, {"run": str(run)}


def test_runs_are_evaluated_side_by_side(made: Path, tmp_path: Path) -> None:
    page = evaluate([made / "scratch", made / "transferred"], tmp_path / "out", CONFIG, open_noise)
    assert page == tmp_path / "out" / "index.html"
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    scratch, transferred = numbers["generators"]
    assert (scratch["name"], transferred["name"]) == ("scratch", "transferred")
    assert scratch["scales"] == transferred["scales"]  # the same places, styles and seeds
    assert scratch["origin"] == {"run": str(made / "scratch")}
    assert numbers["settings"]["steps"] == 30
    assert "Comparison" in page.read_text()


def test_one_run_has_its_page_in_its_folder(made: Path) -> None:
    assert evaluate([made / "scratch"], None, CONFIG, open_noise) == made / "scratch/evaluation/index.html"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": "/absent/table"}, "/absent/table"),
        ({"factors_identity": "other"}, "table: another table of factors than .*transferred was"),
        ({"data": "/absent/store"}, "/absent/store"),
    ],
)
def test_runs_that_do_not_fit_are_refused_in_one_line(
    made: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(made / "scratch", tmp_path / "transferred")
    path = tmp_path / "transferred" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message) as error:
        evaluate([tmp_path / "transferred"], tmp_path / "out", CONFIG, open_noise)
    assert "\n" not in str(error.value)


def test_runs_that_held_out_other_parts_are_not_compared(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "scratch", tmp_path / "other")
    path = tmp_path / "other" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "config": {"held_out_fraction": 0.3}}))
    with pytest.raises(UserError, match="other: trained on another store or table"):
        evaluate([made / "scratch", tmp_path / "other"], tmp_path / "out", CONFIG, open_noise)


def test_what_is_no_run_of_synthesis_and_missing_outputs_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pretrained: not a run of synthesis"):
        evaluate([made / "pretrained"], tmp_path, CONFIG, open_noise)
    with pytest.raises(UserError, match="output: found none for 2 runs"):
        evaluate([made / "scratch", made / "transferred"], None, CONFIG, open_noise)
    with pytest.raises(UserError, match="two of the name scratch"):
        evaluate([made / "scratch"] * 2, tmp_path, CONFIG, open_noise)


def test_a_run_is_sampled_by_its_pipeline(tmp_path: Path) -> None:
    make_parts(tmp_path)
    run, table = make_run(tmp_path, make_network()), FactorTable.open(tmp_path / "factors.safetensors")
    record = json.loads((run / "run.json").read_text())
    record["config"] |= {"held_out": "volumes", "held_out_fraction": 0.3}
    (run / "run.json").write_text(json.dumps({**record, "held_out_volumes": ["ct_a"]}))
    config = EvaluateConfig(samples=4, decoded=2, scales=((1.0, 2.0),), steps=2, device="cpu")

    sample, origin = open_pipeline(run, table, config)
    content, style = 3, len(table.volume) - 1
    made = sample([content, style], [style, content], (1.0, 2.0), [5, 6])
    x, y, z = table.start[content].tolist()
    a, b, c = table.start[style].tolist()
    [expected] = MeDUETPipeline.from_run(run)(
        f"ct_a@{x},{y},{z}", f"mr@{a},{b},{c}", seeds=[5], steps=2, content_scale=1.0, style_scale=2.0
    )
    assert (table.volumes[int(table.volume[content])]["name"], made.shape) == ("ct_a", (2, 4, 8, 8, 8))
    torch.testing.assert_close(made[0], expected.latents)
    assert origin["average"] == "power_0.100"

    page = evaluate([run], None, config)
    numbers = json.loads((page.parent / "evaluation.json").read_text())
    assert numbers["volumes"] == ["ct_a"]
    assert "kid/tokenizer" in numbers["generators"][0]["scales"][0]["figures"]
    assert (page.parent / "run-grid.png").is_file()
