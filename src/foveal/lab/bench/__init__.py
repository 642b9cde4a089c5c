"""`foveal bench`: is it right, how fast is it, and against what; see `foveal.lab.bench.run`."""
