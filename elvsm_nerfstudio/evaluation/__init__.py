"""Where numbers come from; knows no network."""
