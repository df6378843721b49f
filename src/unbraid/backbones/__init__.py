"""Pictures and texts to vectors: networks that are trained with the model, or kept as they came."""
