"""Encode a whole scan, and save what varies most in its content and style as maps to lay over it in a viewer.

python examples/encode_scan.py RUN scan.nii.gz --output maps
python examples/encode_scan.py EXPORTED head.nii.gz --tokenizer autoencoder.pt --output maps
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from nibabel.nifti1 import Nifti1Image, save

from meduet_fast.data import find_volumes
from meduet_fast.encoding import EncodeConfig, Encoder

COMPONENTS = 3


def main() -> None:
    """Read the command line, encode, save a NIfTI file for content and one for style."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="a run, an export, or published weights")
    parser.add_argument("scan", type=Path, help="a volume, or a folder with one DICOM series")
    parser.add_argument("--output", type=Path, required=True, help="folder for the maps")
    parser.add_argument("--tokenizer", help="of the network's latents, if no run tells it")
    options = parser.parse_args()

    encoder = Encoder.load(options.weights, EncodeConfig(tokenizer=options.tokenizer))
    [entry] = find_volumes(options.scan).volumes
    scan = encoder.encode(entry)
    options.output.mkdir(parents=True, exist_ok=True)
    for kind, tokens in (("content", scan.content), ("style", scan.style)):
        grid = tokens.shape[:3]
        tokens = tokens.flatten(0, 2) - tokens.mean((0, 1, 2))  # (L, D)
        _, spread, axes = torch.linalg.svd(tokens, full_matrices=False)
        maps = (tokens @ axes[:COMPONENTS].T).unflatten(0, grid)  # (X, Y, Z, 3)
        file = options.output / f"{entry.name}_{kind}.nii.gz"
        save(Nifti1Image(maps.numpy(), scan.affine), file)
        share = float(spread[:COMPONENTS].square().sum() / spread.square().sum())
        print(f"{file}: {tuple(tokens.shape)} tokens, {share:.0%} of their variance in {COMPONENTS} maps")


if __name__ == "__main__":
    main()
