"""What comes from a disk, and what can be wrong with it. Nothing here knows a model."""
