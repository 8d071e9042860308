"""The tables of README.md and docs/, written from ``studies/results``; one module a kind of result."""
