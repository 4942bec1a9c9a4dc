"""The benchmark behind ``cute-attn bench``: ours and every peer that is installed, measured in one run.

problems     shapes, by suites                         contender     what is measured, ours or a peer's
timing       rounds, order, median: no clock of its own cuda_timer   CUDA graphs, events, a cold L2
accuracy     float64 on a sample of the rows           comparison    TOPS, fraction of peak, ratio to a peer
results      what a run leaves, as JSON                provenance    which GPU, driver, versions, commit
runner       one run                                   table         how it is printed
"""
