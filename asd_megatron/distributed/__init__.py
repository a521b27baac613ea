"""Process groups of a layout, Python objects between ranks, devices, and the start and end of ranks."""
