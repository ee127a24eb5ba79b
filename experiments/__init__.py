"""The only place that knows everything: configuration, device, disk, and the main programs."""
