"""Several losses to one parameter change, and averages of weights along a training."""
