"""The VAE between image voxels and latents; knows no model."""
