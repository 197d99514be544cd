"""What a number is worth: predictions that need no learning."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from elvsm_nerfstudio.views import Views


def copy_nearest(context: Views, target: Views) -> Float[Tensor, "scene target height width 3"]:
    """For each target the image of the context view whose camera centre is nearest, as it is."""
    target_centres, context_centres = target.camera_to_world[:, :, :3, 3], context.camera_to_world[:, :, :3, 3]
    nearest = (target_centres[:, :, None] - context_centres[:, None]).norm(dim=-1).argmin(dim=-1)
    index = nearest[..., None, None, None].expand(-1, -1, *context.rgb.shape[2:])
    return context.rgb.gather(1, index)


def mean_of_context(context: Views, target: Views) -> Float[Tensor, "scene target height width 3"]:
    """For each target the mean of all context views' images, whatever the cameras."""
    mean = context.rgb.mean(dim=1, keepdim=True)
    return mean.expand(-1, target.num_views, -1, -1, -1)


BASELINES = {"copy_nearest": copy_nearest, "mean_of_context": mean_of_context}
