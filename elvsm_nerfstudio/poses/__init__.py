"""Cameras of photos and videos: COLMAP through pycolmap, written as a capture that nerfstudio reads."""
