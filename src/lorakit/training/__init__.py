"""Train an adapter on a data file, with transformers and TRL (the extra "train")."""
