"""One engine for unnormalised densities that are known at every level: moves, particles, replicas, constants."""
