"""The families of heads as they are trained: torch modules with float32 weights."""
