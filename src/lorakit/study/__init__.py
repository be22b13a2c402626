"""What an adaptation did to the weights, and the methods to compare it with."""
