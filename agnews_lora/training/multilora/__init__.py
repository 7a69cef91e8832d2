"""The multi-LoRA core: K trials train at once through one frozen base, each in a slot of its own."""
