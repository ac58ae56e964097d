"""Put the fast layers into a MONAI model: same weights, same outputs, less time.

    pip install einops     # MONAI's attention needs it
    python examples/fast_layers.py

On a GPU of compute capability 8.0 or more the Triton kernels run, elsewhere plain PyTorch.
"""

from __future__ import annotations

import argparse

import torch
from monai.networks.nets import ViT
from torch.utils.benchmark import Timer

from meduet_fast.devices import select_device
from meduet_fast.layers import accelerate


def main() -> None:
    """Encode random volumes before and after the swap; compare outputs and times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="volumes of 96^3 voxels")
    parser.add_argument("--width", type=int, default=384, help="of a token; a multiple of 6 heads")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks")
    parser.add_argument("--calls", type=int, default=5, help="for each timing")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = select_device("auto")
    model = ViT(
        in_channels=1,
        img_size=(96, 96, 96),
        patch_size=(16, 16, 16),
        hidden_size=options.width,
        mlp_dim=4 * options.width,
        num_layers=options.layers,
        num_heads=6,
    )
    model = model.to(device).eval()
    volumes = torch.randn(options.batch, 1, 96, 96, 96, device=device)  # (B, 1, X, Y, Z)
    timer = Timer("model(volumes)", globals={"model": model, "volumes": volumes})

    with torch.inference_mode():
        before, _ = model(volumes)  # (B, L, D)
        slow = timer.timeit(options.calls).median
        for swap in accelerate(model):  # in place, so the timer runs the new layers
            print(f"{swap.path}: {swap.before} -> {swap.after}")
        after, _ = model(volumes)  # (B, L, D)
        fast = timer.timeit(options.calls).median

    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    print(f"outputs equal up to {(after - before).abs().max():.1e}")
    print(f"{slow * 1e3:.1f} ms before, {fast * 1e3:.1f} ms after")


if __name__ == "__main__":
    main()
