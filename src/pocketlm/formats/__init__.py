"""Folders and files of other tools, read and written."""
