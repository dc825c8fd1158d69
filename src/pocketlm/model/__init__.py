"""The model: what it is, how it begins, how large it is, what it is trained to lower."""
