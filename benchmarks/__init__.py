"""Measurements, each one command; results/ holds one dated file a machine."""
