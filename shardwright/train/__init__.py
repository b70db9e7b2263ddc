"""Training: optimizers, schedules, the step, the loop around it, and what it writes about itself."""
