"""Models handed on to other tools, and taken from them."""
