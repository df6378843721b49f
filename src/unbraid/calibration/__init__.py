"""After training: logits to better probabilities, also for a target without labels."""
