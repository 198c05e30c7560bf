"""What is trained: learned editors, fine-tuning, SERAC."""
