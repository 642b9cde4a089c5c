"""`foveal demo`: train a small Wan on a real clip, convert it, fine-tune, generate, and report."""
