"""What a distilled backbone is good for: detectors and segmenters that begin with it."""
