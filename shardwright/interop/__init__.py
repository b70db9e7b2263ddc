"""Exchange with other systems' formats; reads the families' maps and knows no family itself."""
