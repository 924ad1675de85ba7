"""What `scripts/benchmark.py` measures: attacks, environments, steps of games; and its clock."""
