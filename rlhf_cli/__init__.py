"""End-to-end online RLHF from recipe files."""

__version__ = "0.1.0"
