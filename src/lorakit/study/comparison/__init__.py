"""`lorakit compare`: which method, which rank, which layers, on the model and data at hand."""
