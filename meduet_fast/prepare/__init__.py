"""Volumes become a store of latents; a published cache is taken over."""
