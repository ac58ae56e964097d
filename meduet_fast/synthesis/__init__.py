"""Make volumes: anatomy of one scan, scanner of another."""
