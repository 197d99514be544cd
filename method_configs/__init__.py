"""Every method that this package gives nerfstudio: the targets of its entry points."""

import numpy as np
import torch

from elvsm_nerfstudio.programs import read_paths_of_other_systems, report_errors_plainly
from elvsm_nerfstudio.unavailable import Unavailable

# nerfstudio's schedulers leave numpy's float64 in checkpoints, and nerfstudio reads those in a way in which torch from
# version 2.6 on, which this package asks for, refuses it: without this line, runs of nerfacto and others trained beside
# it could be neither evaluated nor resumed. It is here because every one of nerfstudio's programs imports this module.
torch.serialization.add_safe_globals([np.float64(0).__reduce__()[0], np.dtype, type(np.dtype(np.float64))])

report_errors_plainly()
read_paths_of_other_systems()

try:
    from elvsm_nerfstudio.method_configs.efficient_lvsm import (
        efficient_lvsm,
        efficient_lvsm_512,
        efficient_lvsm_object,
        efficient_lvsm_tiny,
    )
    from elvsm_nerfstudio.method_configs.efficient_lvsm_plus import efficient_lvsm_plus, efficient_lvsm_plus_tiny
    from elvsm_nerfstudio.method_configs.lvsm import (
        lvsm_decoder_only,
        lvsm_decoder_only_tiny,
        lvsm_encoder_decoder,
        lvsm_encoder_decoder_tiny,
    )
except Exception as error:  # whatever is broken, the other methods are not
    efficient_lvsm = efficient_lvsm_tiny = Unavailable(error)
    efficient_lvsm_512 = efficient_lvsm_object = Unavailable(error)
    efficient_lvsm_plus = efficient_lvsm_plus_tiny = Unavailable(error)
    lvsm_decoder_only = lvsm_decoder_only_tiny = lvsm_encoder_decoder = lvsm_encoder_decoder_tiny = Unavailable(error)

try:
    from elvsm_nerfstudio.method_configs.splatfacto_lvsm import splatfacto_lvsm
    from elvsm_nerfstudio.method_configs.splatfacto_sparse import splatfacto_sparse
except Exception as error:
    splatfacto_lvsm = splatfacto_sparse = Unavailable(error)

__all__ = [
    "efficient_lvsm",
    "efficient_lvsm_plus",
    "efficient_lvsm_plus_tiny",
    "efficient_lvsm_512",
    "efficient_lvsm_object",
    "efficient_lvsm_tiny",
    "lvsm_decoder_only",
    "lvsm_decoder_only_tiny",
    "lvsm_encoder_decoder",
    "lvsm_encoder_decoder_tiny",
    "splatfacto_lvsm",
    "splatfacto_sparse",
]
