"""Games: what one step of each attacker-defender game does."""
