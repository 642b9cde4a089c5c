"""Looking inside sparse attention: what is selected, and what it keeps."""
