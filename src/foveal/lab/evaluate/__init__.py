"""Dense against sparse generation: how close, how steady, how fast, in how much memory."""
