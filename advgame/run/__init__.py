"""Around a game: command line, run folder, checkpoints, training loop, curves, studies."""
