"""From photos or a capture to a video of new views, in one call."""
