"""What `scripts/gpu_plan.py` carries to a borrowed GPU, and what it does there in its minutes."""
