"""A sweep harness for LoRA text classifiers under a hard budget of trainable parameters."""

__version__ = "0.1.0"
