"""Files on disk -> named tensors, settings and tokenizers, and back."""
