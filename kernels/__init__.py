"""The fast operations, each with its eager reference; needs torch alone."""
