"""ATLAS: exemplar-free continual audio-visual segmentation (after arXiv 2603.08967)."""
