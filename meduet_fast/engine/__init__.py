"""Trains any task: loop, step, checkpoints, processes, precision, logs."""
