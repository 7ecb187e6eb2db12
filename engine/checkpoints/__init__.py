"""Checkpoints: weights, learning rates and Adam moments of a training run, read from files and put into a model."""
