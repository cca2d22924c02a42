"""What an adapter is: weights, specs, formats, the batched delta, merging. Importing the package imports no torch."""
