"""Volumes in, crops of latents out; knows no model."""
