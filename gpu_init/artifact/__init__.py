"""The output folder: its format, how it is read, written, published and exported."""
