"""Training and fine-tuning of sparse video transformers."""
