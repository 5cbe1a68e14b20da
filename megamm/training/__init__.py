"""Training: one step, the loop around it, optimizer, checkpoints, evaluation and what is reported. Read step.py first."""
