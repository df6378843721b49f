"""A first run file from a look at a user's files: tables, then columns, labels, times, splits and leaks, then text."""
