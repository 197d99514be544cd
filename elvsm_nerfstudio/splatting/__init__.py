"""The gsplat baseline: nerfstudio's splatfacto on a few given context frames, with or without CUDA."""
