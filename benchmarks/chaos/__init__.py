"""Whether anything is lost or done twice when a sweep's processes are killed again and again: `make chaos`."""
