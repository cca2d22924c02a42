"""Training adapters: dialogue files, the optimizer loop, checkpoints of a run, its report and card."""
