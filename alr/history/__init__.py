"""What the scripts v1 to v10 did, kept exactly as it was: signals, controllers, resizes, forward passes."""
