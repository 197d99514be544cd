"""splatfacto-sparse with views beside its context frames that Efficient-LVSM renders from these."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

from nerfstudio.plugins.types import MethodSpecification

from elvsm_nerfstudio.method_configs.splatfacto_sparse import splatfacto_sparse
from elvsm_nerfstudio.splatting.rendered_datamanager import RenderedViewsDataManagerConfig

_config = deepcopy(splatfacto_sparse.config)

splatfacto_lvsm = MethodSpecification(
    config=replace(
        _config,
        method_name="splatfacto-lvsm",
        pipeline=replace(_config.pipeline, datamanager=RenderedViewsDataManagerConfig()),
    ),
    description="splatfacto-sparse on context frames and on views between them that Efficient-LVSM renders.",
)
