"""Guest memory: where it lies, how it is reserved, tracked, and moved by the C core."""
