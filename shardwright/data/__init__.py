"""Data: text becomes token shards (prepare), shards become batches in a reproducible order (shards, order, stream,
examples, loader, remote).

This room sits above `model`, `objective` and `parallel` and below `interop` and `train`. Import from its modules.
"""
