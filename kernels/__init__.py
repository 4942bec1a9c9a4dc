"""CuTe DSL kernels, installed as ``cute_attn.kernels``. Imports nothing of cute_attn outside this package, and no torch."""
