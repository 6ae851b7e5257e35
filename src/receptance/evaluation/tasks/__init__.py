"""Tasks whose examples are drawn on the fly, or read from the files of a benchmark."""
