"""What a model is trained to do: turning sequences into inputs and targets, and hidden states into loss sums."""
