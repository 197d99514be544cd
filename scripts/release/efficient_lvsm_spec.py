"""Efficient-LVSM as a method of NerfBaselines: what its registry wants to know.

With efficient_lvsm.py beside it this is a pull request for nerfbaselines/methods; to try it without one:

    NERFBASELINES_REGISTER=$PWD/efficient_lvsm_spec.py PYTHONPATH=$PWD nerfbaselines train \\
        --method efficient-lvsm --data external://mipnerf360/garden --backend python --output results
"""

from nerfbaselines import register

register(
    {
        "id": "efficient-lvsm",
        "method_class": "efficient_lvsm:EfficientLVSM",
        "conda": {
            "environment_name": "efficient-lvsm",
            "python_version": "3.11",
            "install_script": "pip install elvsm-nerfstudio nerfbaselines 'numpy<2'",
        },
        "metadata": {
            "name": "Efficient-LVSM",
            "description": (
                "A feed-forward network: it encodes a few photos, spread over the scene, and renders new views from "
                "them. Nothing is trained on a scene. An independent implementation."
            ),
            "paper_title": (
                "Efficient-LVSM: Faster, Cheaper, and Better Large View Synthesis Model via Decoupled Co-Refinement "
                "Attention"
            ),
            "paper_link": "https://arxiv.org/pdf/2602.06478",
            "licenses": [{"name": "Apache 2.0"}],
        },
        "presets": {
            "re10k-256": {
                "@description": "The authors' weights, trained on RealEstate10K at 256 px (CC BY-NC-SA 4.0).",
                "weights": "efficient-lvsm-256",
                "image_size": 256,
                "num_context_views": 4,
            },
        },
        "implementation_status": {},
    }
)
