"""What changes the weights: optimizers, learning rates, averages, scales of the loss."""
