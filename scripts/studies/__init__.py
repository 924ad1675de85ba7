"""Tables over seeds, run by `study.py NAME`."""
