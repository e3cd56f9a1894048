"""Heads for a frozen model: prompts, the model's own answers to them, and the fit."""

FAMILIES = ("mtp", "mtp-1", "medusa", "hydra", "eagle3", "layers", "modules")  # see families.py
