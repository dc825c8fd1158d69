"""Hostile files as functions that make them; nothing in here is a binary."""
