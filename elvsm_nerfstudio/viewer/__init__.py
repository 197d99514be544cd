"""What ns-viewer shows beside the picture, and scenes that grow while they are watched."""
