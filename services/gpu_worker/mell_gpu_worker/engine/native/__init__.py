"""A decoder's step in C++ for CPUs: compiled once a machine, used where it is proven equal to the model itself."""
