"""Scores of a model: losses, sampled answers."""
