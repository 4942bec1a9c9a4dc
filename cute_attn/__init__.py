"""Low-bit attention for NVIDIA GPUs since Ampere, in the CuTe DSL."""
