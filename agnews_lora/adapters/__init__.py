"""Adapters: specification, exact parameter count, files, and the base models."""
