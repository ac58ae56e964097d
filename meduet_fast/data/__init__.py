"""Read volumes, keep latents in stores and draw crops of them; knows no model, no autoencoder."""
