"""Reading of data files, and packed batches of their rows."""
