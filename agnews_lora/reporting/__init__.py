"""Pictures and screens made from plain data frames."""
