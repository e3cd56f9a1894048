"""Heads for a frozen model: prompts, the model's own answers to them, and the fit."""
