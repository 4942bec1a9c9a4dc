"""What docs/make_layouts.py writes: figures, passports and budgets of the attention kernels, from their own objects."""
