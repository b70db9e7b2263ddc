"""Pure formulas about a run that is not built: memory by category (later communication and time)."""
