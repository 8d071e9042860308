"""From a configuration and data to a run folder: settings, build, loop, checkpoints."""
