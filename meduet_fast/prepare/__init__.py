"""Make latent stores: of volumes, or of the published code's cache; knows no model of ours."""
