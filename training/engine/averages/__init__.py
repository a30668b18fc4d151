"""Moving averages of weights, and their lengths chosen after the training."""
