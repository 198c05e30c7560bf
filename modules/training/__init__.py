"""Training: learned editors, fine-tuning, SERAC's two models."""
