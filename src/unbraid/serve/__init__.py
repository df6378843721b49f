"""A bundle behind HTTP: the store of histories, the ranker, the server."""
