"""What is known of each family of transformers, one file each."""
