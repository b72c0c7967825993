"""From the dense outputs of the detector to losses and detections: pure functions on arrays."""
