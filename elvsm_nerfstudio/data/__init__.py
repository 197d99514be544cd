"""From files to view sets."""
