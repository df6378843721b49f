"""Which look at the validation split is kept, for a target without labels."""
