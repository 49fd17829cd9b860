"""One short program for each training stack; each runs on a CPU in seconds.

``python -m benchmarks.examples.<name>``.  The models are tiny and have random weights, so
that nothing is downloaded: it is the lines around the optimizer that matter.
"""
