"""What an adaptation did to the weights."""
