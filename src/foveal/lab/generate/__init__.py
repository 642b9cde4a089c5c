"""Videos and images from pipelines, dense and sparse, in batches that may be interrupted."""
