"""Transformer language models as plain single-device modules; nothing here knows of layouts, data or training."""
