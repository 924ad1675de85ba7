"""What `scripts/evaluate.py` and its like judge: classifiers, images, attacks, from their words."""
