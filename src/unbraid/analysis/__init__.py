"""A trained model and data to findings and figures: what was learned, and where tasks or domains hurt each other."""
