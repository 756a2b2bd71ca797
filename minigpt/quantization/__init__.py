"""How int4 codes are chosen (one file a method), the layer that holds them, and the walk that converts a model."""
