"""Our speed against that of other trainers, measured side by side: `python -m benchmarks --help`."""
