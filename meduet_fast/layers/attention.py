"""Choose who computes attention in the transformer blocks: for the process, in no weights and no sizes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from meduet_fast.errors import UserError, install_hint

AttentionBackend = Literal["sdpa", "flash2", "flash4", "xformers"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# What the blocks call: softmax(q k^T / sqrt(d)) v of (B, H, N, d) each. They look it up here in every pass,
# which costs the default nothing: it is PyTorch's function itself.
attend: Attend = F.scaled_dot_product_attention

# What FlashAttention takes.
_HALF = (torch.float16, torch.bfloat16)


# Name of the extra -> package on PyPI, module, function, dtypes. All three take and give (B, N, H, d).
_PACKAGES = {
    "flash2": ("flash-attn", "flash_attn", "flash_attn_func", _HALF),
    "flash4": ("flash-attn-4", "flash_attn.cute", "flash_attn_func", _HALF),
    "xformers": ("xformers", "xformers.ops", "memory_efficient_attention", (*_HALF, torch.float32)),
}


def attention_backend(name: AttentionBackend) -> Attend:
    """Return the function of a backend: (B, H, N, d) each -> (B, H, N, d), without dropout or a mask.

    Args:
        name: "sdpa", PyTorch's own choice between flash, cuDNN and others; "flash2", FlashAttention 2;
            "flash4", FlashAttention 4; "xformers". All but the first are optional extras, for CUDA.

    Raises:
        ValueError: for another name.
        UserError: if the package is not installed, can't be imported or, where there is a GPU, can't compute
            on it. The function itself raises it for tensors that the package can't take.
    """
    if name == "sdpa":
        return F.scaled_dot_product_attention
    if name not in _PACKAGES:
        known = ", ".join(repr(item) for item in get_args(AttentionBackend))
        raise ValueError(f"attention is {name!r}, expected one of {known}")
    package, module, attribute, dtypes = _PACKAGES[name]
    advice = f"{install_hint(name)}, or take attention 'sdpa'"
    try:
        function = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # the last two: for another torch
        raise UserError(
            f"attention {name!r} needs the package {package}, which can't be imported ({error}): {advice}"
        ) from error
    if torch.cuda.is_available():
        # Some packages import although what they compiled is for another torch or GPU.
        try:
            heads = torch.zeros(1, 8, 1, 64, dtype=torch.float16, device="cuda")  # (B, N, H, d)
            function(heads, heads, heads)
        except RuntimeError as error:  # NotImplementedError is one
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"attention {name!r}: the installed {package} can't compute on this GPU with torch "
                f"{torch.__version__} ({reason}): {advice}"
            ) from error

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.is_meta:  # shapes alone, as when FLOPs are counted
            return F.scaled_dot_product_attention(query, key, value)
        if not query.is_cuda or query.dtype not in dtypes:
            expected = ", ".join(str(dtype) for dtype in dtypes)
            raise UserError(
                f"attention {name!r} got {query.dtype} on {query.device.type}, expected {expected} on cuda; "
                "'sdpa' takes everything"
            )
        result = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))  # (B, N, H, d)
        # Releases of FlashAttention 4 differ in whether they give the log-sum-exp too.
        attended = result[0] if isinstance(result, tuple) else result
        return attended.transpose(1, 2)  # (B, H, N, d)

    return run


def set_attention_backend(name: AttentionBackend, device: torch.device | str | None = None) -> None:
    """Choose who computes attention in every transformer block of this process from now on.

    A model that ``torch.compile`` has compiled already is compiled again.

    Args:
        name: see :func:`attention_backend`.
        device: where the model will run, if known: a backend that can't run there is refused now and not in
            the first pass.

    Raises:
        ValueError: for another name.
        UserError: if the package is absent, or the device not for it. The choice stays as it was.
    """
    global attend
    chosen = attention_backend(name)
    if device is not None and name != "sdpa" and torch.device(device).type != "cuda":
        raise UserError(
            f"attention {name!r} runs on cuda only, the device is {torch.device(device)}; take 'sdpa'"
        )
    attend = chosen
