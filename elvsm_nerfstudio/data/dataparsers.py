"""The formats that this package gives nerfstudio: the targets of its dataparser entry points.

nerfstudio loads them while its own data managers are half imported: nothing in here may import one.
"""

from elvsm_nerfstudio.unavailable import Unavailable

try:
    from nerfstudio.plugins.registry_dataparser import DataParserSpecification

    from elvsm_nerfstudio.data.posed_json_dataparser import PosedJsonDataParserConfig
    from elvsm_nerfstudio.data.realestate10k_dataparser import RealEstate10KDataParserConfig

    realestate10k = DataParserSpecification(
        config=RealEstate10KDataParserConfig(),
        description="RealEstate10K, ACID or DL3DV in pixelSplat's chunks, one scene",
    )
    posed_json = DataParserSpecification(
        config=PosedJsonDataParserConfig(), description="LVSM's JSON of posed frames, one scene"
    )
except Exception as error:  # whatever is broken, the other methods are not
    realestate10k = posed_json = Unavailable(error)

__all__ = ["posed_json", "realestate10k"]
