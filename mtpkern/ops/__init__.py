"""The operations of a step: what they are, and their implementations."""
