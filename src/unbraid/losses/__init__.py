"""(output, batch) to one scalar per objective."""
