"""Demo and benchmarks of ``cg_optim``: real models, real text, and the real peers."""
