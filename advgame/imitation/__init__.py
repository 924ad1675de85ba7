"""Imitation: demonstrations, GAIL's discriminator, what updates it, and how good an imitator is."""
