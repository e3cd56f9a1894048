"""Heads for a frozen model: prompts, the model's own answers to them, and the fit."""

FAMILIES = ("mtp", "mtp-1", "medusa", "hydra", "eagle3", "layers", "modules")  # see families.py
DEFAULT_MINUTES = 60.0  # of a run without a number of steps
