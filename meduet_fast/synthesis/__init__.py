"""Generate latents from two factors: the anatomy of one scan, as the scanner of another would show it."""
