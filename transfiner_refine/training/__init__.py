"""Training: targets, losses (Mask Transfiner, Eq. 2), simulated coarse masks and the training loop."""
