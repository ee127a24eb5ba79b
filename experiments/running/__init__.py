"""One kept run, whatever trains: its folder, checkpoints, log and signals."""
