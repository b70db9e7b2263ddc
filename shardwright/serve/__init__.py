"""Using a trained model: generation now, a server later."""
