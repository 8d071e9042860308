"""How we know what we know: other density models, the paper's tables and figures, benchmarks. Not in the wheel."""
