"""Settings of a run that trains a network of synthesis."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from meduet_fast.data.held_out import HeldOutKind
from meduet_fast.engine.config import AdamWConfig, EngineConfig
from meduet_fast.models.blocks import Gelu
from meduet_fast.settings import FROM_0, FROM_1, POSITIVE, SHARE, Range, SettingError, check_numbers

from .averages import WIDEST
from .crops import FactorSource
from .diffusion import Objective, TimeDraw


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; the defaults are B of the published ones.

    Attributes:
        patch_size: edge of a patch in latent voxels.
        hidden_size: width of a token, a multiple of 6 and of num_heads.
        depth: blocks.
        num_heads: of attention.
        mlp_ratio: width of the blocks' hidden layer, in widths of a token.
        qk_norm: normalise queries and keys in each head.
        gelu: "tanh" is the published one; "exact" is that of pretraining.
    """

    patch_size: int = 4
    hidden_size: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    gelu: Gelu = "tanh"

    def __post_init__(self) -> None:
        check_numbers(self, FROM_1, "patch_size", "hidden_size", "depth", "num_heads")
        check_numbers(self, POSITIVE, "mlp_ratio")


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net.

    Attributes:
        patch_size: edge of the patches that its first layer embeds; 1 is a convolution.
        num_channels: of each level, finest first; a level has half the resolution of the one before.
        num_res_blocks: of each level.
        attention_levels: which levels attend to themselves and to content, one for each level.
        num_heads: of attention.
        norm_num_groups: groups of every group norm; divides all channels.
    """

    patch_size: int = 2
    num_channels: tuple[int, ...] = (192, 384, 768)
    num_res_blocks: int = 2
    attention_levels: tuple[bool, ...] = (False, True, True)
    num_heads: int = 12
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        check_numbers(
            self, FROM_1, "patch_size", "num_channels", "num_res_blocks", "num_heads", "norm_num_groups"
        )


@dataclass(frozen=True)
class DiffusionConfig:
    """What the network learns to predict, and how; the defaults are the published ones, but for the times.

    Attributes:
        objective: "flow" is flow matching (SiT); "epsilon" predicts the noise of 1000 steps (DiT).
        times: how noise levels are drawn: "uniform", or "logit_normal", most of them in the middle; the
            latter is for "flow".
        shift: moves noise levels of "flow" up, for crops of more voxels; 1 does not.
        min_snr: largest signal-to-noise ratio that the loss of "epsilon" counts by; null counts all alike.
        drop_content: part of the crops whose content is left out.
        drop_style: part of the crops whose style is left out.
        content_noise: deviation of the noise on content in training, in deviations of each dimension: it
            covers traces of the scanner, which are finer than the anatomy.
        align: weight of the alignment of the network's tokens to the pretrained encoder's; 0 leaves it out.
        align_until: part of the steps after which alignment ends.
    """

    objective: Objective = "flow"
    times: TimeDraw = "uniform"
    shift: float = 1.0
    min_snr: float | None = 5.0
    drop_content: float = 0.2
    drop_style: float = 0.2
    content_noise: float = 0.0
    align: float = 0.0
    align_until: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(self, POSITIVE, "shift", "min_snr")
        check_numbers(self, FROM_0, "align", "content_noise")
        check_numbers(self, SHARE, "drop_content", "drop_style")
        check_numbers(self, Range(0, 1), "align_until")
        if self.objective == "epsilon" and self.times != "uniform":
            raise SettingError("times", f"found {self.times}, expected uniform for objective epsilon")


@dataclass(frozen=True)
class SynthesisConfig(EngineConfig):
    """A run that trains a network of synthesis; the defaults are SiT-B on one device.

    Crops are the windows of the table of factors: their size is set there.

    Attributes:
        network: "transformer" or "unet".
        transformer: sizes of the former.
        unet: sizes of the latter.
        diffusion: objective, noise levels, dropped factors, alignment.
        optimizer: AdamW and its learning rate.
        content: "pooled" is one vector of a crop; "tokens" a map of it, place by place.
        content_projection: width to which tokens of content are narrowed.
        content_pool: tokens of content along each axis whose mean the network sees.
        factor_source: "own" are those of the crop; "volume" the means of its volume, the published ones.
            Tokens of content are the crop's own in any case.
        exchanged_share: part of the crops that are shown in another style, as the pretrained decoder gives it
            to them, and with the style that they then have: content can't tell which. For tables with
            exchanged styles.
        standardise: "table" brings every dimension of a factor to mean 0 and deviation 1; "volume" does so
            within each volume for tokens of content, and takes away what a scanner does to all of them;
            "none" is the published way.
        power_averages: averages of the weights by a power of the step: their widths, as part of the run.
        constant_average: momentum of the average with a constant one.
        held_out: see ``pretrain``.
        held_out_fraction: see ``pretrain``.
    """

    network: Literal["transformer", "unet"] = "transformer"
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: AdamWConfig = field(
        default_factory=lambda: AdamWConfig(5e-5, final_learning_rate=5e-6, beta2=0.999, weight_decay=0.0)
    )
    batch_size: int = 16
    content: Literal["pooled", "tokens"] = "pooled"
    content_projection: int = 16
    content_pool: int = 1
    factor_source: FactorSource = "own"
    exchanged_share: float = 0.0
    standardise: Literal["table", "volume", "none"] = "table"
    power_averages: tuple[float, ...] = (0.05, 0.1)
    constant_average: float = 0.9999
    held_out: HeldOutKind = "slab"
    held_out_fraction: float = 0.0

    @property
    def averages(self) -> int:
        """Count the averages of the weights that a run has."""
        return len(self.power_averages) + 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, FROM_1, "content_projection", "content_pool")
        check_numbers(self, SHARE, "constant_average", "held_out_fraction", "exchanged_share")
        check_numbers(self, Range(0, WIDEST, above=True), "power_averages")
        if self.held_out == "volumes" and not self.held_out_fraction:
            raise SettingError("held_out_fraction", "found 0, expected more for held_out 'volumes'")
        if self.standardise == "volume" and self.content == "pooled":
            raise SettingError("standardise", "found volume, expected table or none for content 'pooled'")
