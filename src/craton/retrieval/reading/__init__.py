"""One file a format: from bytes to a text whose headings and pages are known. `readers.py` picks among them."""
