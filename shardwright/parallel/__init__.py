"""How a model is spread over devices: world, precision, recomputation (later mesh, tensor, pipeline, context)."""
