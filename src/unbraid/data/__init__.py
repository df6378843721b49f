"""A declared log, encoded once and read in batches; looking at logs, and public ones."""
