"""Heads for a frozen model: prompts, the model's own answers to them, and the fit."""

# The kinds of heads that can be trained; heads/families.py describes them.
FAMILIES = ("mtp", "mtp-1", "medusa", "hydra", "eagle3", "layers", "modules")
DEFAULT_MINUTES = 60.0  # length of a run that is given neither minutes nor steps
