"""Images: found, read, split, and made into batches."""
