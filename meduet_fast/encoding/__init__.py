"""Encode whole scans with a pretrained network: a token of content and style for every patch."""

from meduet_fast.errors import needs_extra

with needs_extra("train"):
    from .encode import EncodeConfig, EncodedScan, Encoder, FactorMaps, encode_latents
    from .table import EncodeSummary, encode_scans

__all__ = [
    "EncodeConfig",
    "EncodeSummary",
    "EncodedScan",
    "Encoder",
    "FactorMaps",
    "encode_latents",
    "encode_scans",
]
