"""Scripts that measure; each prints its table and can write its JSON."""
