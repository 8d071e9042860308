"""Bridges to other libraries and file formats; each file needs only its own peer."""
