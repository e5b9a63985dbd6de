"""Training: one trainer, a run on disk, stage after stage."""
