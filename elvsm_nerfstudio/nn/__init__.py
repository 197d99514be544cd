"""The networks. Plain torch: nothing in here knows nerfstudio."""
