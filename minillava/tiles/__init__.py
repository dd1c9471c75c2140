"""LLaVA-1.6 and LLaVA-OneVision: a picture as an overview and tiles of it, at the full resolution
of each (Liu et al. 2024, LLaVA-NeXT; Li et al. 2024)."""
