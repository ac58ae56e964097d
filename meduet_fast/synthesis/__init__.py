"""Make latents of scans from content and style, each of any origin."""
