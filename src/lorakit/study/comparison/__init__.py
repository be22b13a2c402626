"""`lorakit compare`: which method, rank and layers are best on the user's model and data."""
