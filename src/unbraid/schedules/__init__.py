"""Which parameters, rows and weights train when."""
