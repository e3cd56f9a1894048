"""Drafters: what proposes tokens, how it is loaded, and how many tokens it proposes."""
