"""What touches disk, network or process: one module per DVC stage or command, run as `python -m tasks.<stage>`."""
