"""Data: documents split, tokenized into shards on disk, and read back as rows by position."""
