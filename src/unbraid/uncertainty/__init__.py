"""How sure a prediction is, and scores that explore."""
