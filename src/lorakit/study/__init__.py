"""Measure what an adaptation did to the weights, and compare LoRA with other methods."""
