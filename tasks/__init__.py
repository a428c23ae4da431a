"""What touches disk, network or process: one module per DVC stage or command, run as `python -m tasks.<stage>`."""

import os

# Threads that wait for one another by spinning keep the loader from its processor: where there are two, a training step
# then takes two to three times as long. Read when PyTorch is loaded, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
