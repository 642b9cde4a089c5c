"""A page to look around in: which cubes of a video a token attends to, and what leaving the others out costs."""
