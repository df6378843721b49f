"""One vector per view to one per task."""
