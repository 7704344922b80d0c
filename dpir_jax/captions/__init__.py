"""Captions: what is in a photo, in words, in a text file beside it."""
