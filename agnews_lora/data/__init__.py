"""Text in, token table out."""
