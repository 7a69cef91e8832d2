"""Strict models of the YAML files that a person writes."""
