"""How near samples are to the data: Fréchet and kernel distances, precision and recall, in named features."""
