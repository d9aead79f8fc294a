"""The GPU day: whether everything is right on a CUDA device, and what it costs there, in one command."""
