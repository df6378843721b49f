"""The fields of a view to one vector."""
