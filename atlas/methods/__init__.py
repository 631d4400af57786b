"""The continual-learning methods beside Low-Rank Anchoring, a file each."""
