"""One engine for unnormalised densities that are known at every level: moves, particles, replicas, constants.

Functions here take alike: a ``target``, the ``kernels`` of its levels, a CPU ``generator``, and ``progress``, which
shows a progress bar. Points are in model units, float64.
"""
