"""Where and how things run: devices, processes, batches that memory holds, files."""
