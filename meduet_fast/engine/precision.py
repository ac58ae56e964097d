"""In which numbers a step computes: float32, bfloat16 by autocast, or float8 in the linear layers of blocks.

Weights, their gradients, AdamW's moments and the teacher are float32 in all of them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from meduet_fast.errors import UserError, install_hint

Precision = Literal["auto", "float32", "bfloat16", "float8"]

# By torchao's own word its most accurate recipe: a scale for every row, and gradients of weights come
# from bfloat16 products. In the others these are float8 too, and as they add up over tokens, the number of
# tokens would have to be a multiple of 16, which not every batch size gives.
_RECIPE = "rowwise_with_gw_hp"
_MULTIPLE = 16  # what a GPU's float8 products ask of both sizes of a weight
_CAPABILITY = (8, 9)  # the first that has them


def low_precision(precision: Precision, device: torch.device) -> bool:
    """Tell whether matrix products are in bfloat16 or less; "auto" has them so on CUDA."""
    return device.type == "cuda" if precision == "auto" else precision != "float32"


def use_float8(blocks: Iterable[nn.Module], device: torch.device) -> int:
    """Swap linear layers for torchao's, in place. Parameters stay the same ones, under the same names.

    Layers with a size that is no multiple of 16 stay as they are. On the CPU float8 is emulated: operands are
    rounded as on a GPU, and multiplied in float32.

    Args:
        blocks: transformer blocks, neither compiled nor sharded yet.
        device: where they are.

    Returns:
        The number of layers swapped.

    Raises:
        UserError: if torchao is absent, the GPU too old, or no layer has the sizes for it.
    """
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        needed, has = (".".join(map(str, version)) for version in (_CAPABILITY, found))
        raise UserError(
            f"precision 'float8' needs a GPU of compute capability {needed} or more, "
            f"{torch.cuda.get_device_name(device)} has {has}; take 'bfloat16'"
        )
    emulate = device.type != "cuda"
    with _quiet():
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # the others: for another torch
            raise UserError(
                f"precision 'float8' needs the package torchao, which can't be imported ({error}): "
                f"{install_hint('float8')}, or take precision 'bfloat16'"
            ) from error
    config = replace(Float8LinearConfig.from_recipe_name(_RECIPE), emulate=emulate)
    count = 0
    for block in blocks:
        convert_to_float8_training(
            block, config=config,
            module_filter_fn=lambda layer, name: isinstance(layer, nn.Linear)
            and not (layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE),
        )  # fmt: skip
        for layer in block.modules():
            if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
                count += 1
                if emulate:  # torchao's layers follow CUDA's autocast alone
                    layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].bfloat16(),))
    if not count:
        raise UserError(
            f"precision 'float8' needs sizes that are multiples of {_MULTIPLE}, and no layer of the "
            "blocks has them: change model.embed_dim or model.decoder_embed_dim, or take precision 'bfloat16'"
        )
    return count


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of an import: they are about torchao's own kernels, which are not used here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # Python 3.12 compiles torchao's source with some
        try:
            yield
        finally:
            logging.disable(before)
