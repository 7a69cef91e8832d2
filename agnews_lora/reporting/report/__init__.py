"""The report of a sweep: what its stores say, composed once, shown as an HTML page and as a PDF."""
