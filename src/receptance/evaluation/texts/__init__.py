"""Losses of texts: read with carried state or in windows, by document and by position."""
