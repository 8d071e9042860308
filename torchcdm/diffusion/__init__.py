"""The forward process: noise schedules, predictions, and densities known in closed form at every level."""
