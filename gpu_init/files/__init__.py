"""Local and remote files, .npy arrays and lines of text."""
