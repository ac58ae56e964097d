"""Encode a whole scan with a pretrained network: maps of content and style, one vector for each patch.

meduet-fast export RUN --output EXPORTED
python examples/encode_scan.py scan.nii.gz --model EXPORTED --output scan.npz
python examples/encode_scan.py head.nii.gz --mr --model EXPORTED --output head.npz
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch

from meduet_fast.autoencoder import Tokenizer, load_tokenizer
from meduet_fast.data.intensity import CT, MR, IntensityRule
from meduet_fast.data.sources import find_volumes
from meduet_fast.data.transforms import TransformConfig, load_volume
from meduet_fast.devices import select_device
from meduet_fast.models import MeDUET


@torch.inference_mode()
def encode_scan(
    scan: Path, model: MeDUET, tokenizer: Tokenizer, intensity: IntensityRule
) -> dict[str, np.ndarray]:
    """Encode a scan, crop after crop.

    Args:
        scan: a NIfTI file. It is resampled as in pretraining, and padded with air to whole crops.
        model: in eval mode, on the tokenizer's device.
        tokenizer: the one that made the latents of the model's pretraining.
        intensity: what of the scan's values becomes [0, 1].

    Returns:
        content (X, Y, Z, D) and style (X, Y, Z, Ds), float32, for a grid of patches in RAS order; and affine
        (4, 4), from the indices in that grid to the position of a patch's centre in mm.

    Raises:
        VolumeError: if the scan is unusable.
    """
    crop, patch = model.config.latent_size, model.config.patch_size
    edge = crop * tokenizer.compression  # of a crop in image voxels
    limits = TransformConfig().max_size
    transform = TransformConfig(
        max_size=(limits[0] // edge * edge, limits[1] // edge * edge, limits[2] // edge * edge),
        min_size=edge,
        multiple=edge,
    )
    [entry] = find_volumes(scan, intensity=intensity).volumes
    volume = load_volume(entry, transform)  # image (1, x, y, z)
    latents = tokenizer.encode(
        volume.image[None].to(next(model.parameters()).device)
    )  # (1, C, x/4, y/4, z/4)

    side = crop // patch  # of a crop in patches
    grid = [size // patch for size in latents.shape[2:]]
    content = np.empty((*grid, model.config.embed_dim), np.float32)
    style = np.empty((*grid, model.config.style_dim), np.float32)
    for corner in product(*(range(0, size, crop) for size in latents.shape[2:])):
        x, y, z = (slice(start, start + crop) for start in corner)
        factors = model(latents[:, :, x, y, z])  # content (1, L, D), style (1, L, Ds)
        place = tuple(slice(start // patch, start // patch + side) for start in corner)
        content[place] = factors.content[0].unflatten(0, (side, side, side)).cpu()  # (side, side, side, D)
        style[place] = factors.style[0].unflatten(0, (side, side, side)).cpu()  # (side, side, side, Ds)

    step = patch * tokenizer.compression  # from patch to patch in image voxels
    to_voxels = np.diag([step, step, step, 1.0])
    to_voxels[:3, 3] = (step - 1) / 2  # voxel 0's centre is at 0, the first patch's at its middle
    return {"content": content, "style": style, "affine": volume.affine @ to_voxels}


def main() -> None:
    """Read the command line, encode, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scan", type=Path, help="NIfTI file")
    parser.add_argument("--model", type=Path, required=True, help="a run's teacher, or an exported folder")
    parser.add_argument("--output", type=Path, required=True, help=".npz file to write")
    parser.add_argument("--tokenizer", default="builtin", help="as in the preparation of the run's data")
    parser.add_argument(
        "--mr", action="store_true", help="intensity by percentiles; the default is a CT window"
    )
    options = parser.parse_args()

    device = select_device("auto")
    model = MeDUET.from_pretrained(options.model).to(device).eval()
    tokenizer = load_tokenizer(options.tokenizer, device)
    maps = encode_scan(options.scan, model, tokenizer, MR if options.mr else CT)
    np.savez(options.output, content=maps["content"], style=maps["style"], affine=maps["affine"])
    print(f"{options.output}: content {maps['content'].shape}, style {maps['style'].shape}")


if __name__ == "__main__":
    main()
