"""`lorakit analyze`: what an adaptation did to the weights."""
