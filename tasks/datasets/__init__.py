"""One module per annotation format, and the demo dataset."""
