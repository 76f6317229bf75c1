"""kvrun: local language model inference around a preallocated KV cache."""

__version__ = "0.1.0"
