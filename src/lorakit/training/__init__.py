"""Data file to adapter, on transformers and TRL (the extra "train")."""
