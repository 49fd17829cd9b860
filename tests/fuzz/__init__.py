"""Long runs: ``make fuzz`` and ``make soak``; the test suite runs a small share of each."""
