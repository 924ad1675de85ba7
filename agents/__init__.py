"""Whoever learns to attack: strategy policies and the algorithms that train them."""
