"""CuTe DSL kernels, installed as ``cute_attn.kernels``; they import no torch and nothing else of cute_attn."""
