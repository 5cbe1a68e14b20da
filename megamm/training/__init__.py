"""Training: one step, the loop around it, optimizer, checkpoints, evaluation, reports. Read step.py first."""
