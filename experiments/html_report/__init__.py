"""One HTML page about all finished runs of a folder."""
