"""Texts from data as Markdown; see `tracking.descriptions`."""

from agnews_lora.tracking.descriptions import code, one_line, text

__all__ = ["code", "one_line", "text"]
