"""The methods that LoRA is compared with."""
