"""The winner in use: registered, promoted, asked for predictions, exported."""
