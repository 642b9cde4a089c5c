"""The former address of `foveal.models`, for scripts and pickles of version 0.1.0."""
