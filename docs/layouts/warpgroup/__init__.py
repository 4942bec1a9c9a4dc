"""docs/hopper.md: the warpgroup-MMA kernels of sm_90a."""
