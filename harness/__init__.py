"""Plumbing of the commands: files, checkpoints, logs, pictures, ranks, data sets. It knows no task and no model."""
