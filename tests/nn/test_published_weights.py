import pytest
import torch

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.published_weights import (
    from_published,
    load_published,
    published_config,
    to_published,
)

CONFIG = EfficientLVSMConfig(width=32, num_layers=2, head_dim=16)
SIZES = {"width": 48, "head_dim": 16, "patch_size": 4, "mlp_ratio": 3}


def networks() -> tuple[EfficientLVSM, EfficientLVSM]:
    return EfficientLVSM(CONFIG), EfficientLVSM(CONFIG)


@pytest.mark.parametrize(
    "config, official_names",
    [
        (EfficientLVSMConfig(num_layers=3, **SIZES), ["self_cross_blocks.1.cross_attn.to_kv.weight"]),
        (LVSMDecoderOnlyConfig(num_layers=3, **SIZES), ["transformer_blocks.2.norm2.weight"]),
        (
            LVSMEncoderDecoderConfig(num_layers=3, num_latents=5, **SIZES),
            ["n_light_field_latent", "transformer_encoder.2.attn.fc.weight", "transformer_decoder.2.norm1.weight"],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_round_trip_through_the_official_layout(config, official_names):
    source, target = config.build(), config.build()
    published = to_published(source.state_dict())
    assert set(official_names) < set(published) and len(published) == len(source.state_dict())
    assert published_config(published) == config
    assert load_published(target, published) == []
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor)


def test_prefixes_are_stripped_and_training_entries_skipped_by_name():
    source, _ = networks()
    published = {f"module._orig_mod.{name}": tensor for name, tensor in to_published(source.state_dict()).items()}
    extra = {"loss_computer.vgg.0.weight": torch.zeros(1), "_orig_mod.repa_projector.8-2.0.weight": torch.zeros(1)}
    ours, skipped = from_published({**published, **extra})
    assert set(ours) == set(source.state_dict())
    assert sorted(skipped) == sorted(extra)


def test_every_problem_is_listed_and_nothing_is_loaded():
    source, target = networks()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    published = to_published(source.state_dict())
    del published["input_self_attn_blocks.1.attn.fc.weight"]
    published["rgbp_tokenizer.1.weight"] = torch.zeros(32, 100)
    published["self_cross_blocks.2.mlp.mlp.0.weight"] = torch.zeros(128, 32)
    with pytest.raises(ValueError) as error:
        load_published(target, published)
    for part in (
        "missing context_blocks.1.attention.to_out.weight (32, 32)",
        "unexpected target_blocks.2.mlp.0.weight (128, 32)",
        "context_tokenizer.weight: found shape (32, 100), expected (32, 576)",
    ):
        assert part in str(error.value)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_names_of_another_architecture_are_refused():
    published = to_published(EfficientLVSM(CONFIG).state_dict())
    lvsm = LVSMDecoderOnlyConfig(width=32, num_layers=2, head_dim=16).build()
    mixed = {**published, "transformer_blocks.0.attn.fc.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="of EfficientLVSM; unexpected entries: transformer_blocks.0.attn.fc.weight"):
        from_published(mixed)
    with pytest.raises(ValueError, match="unexpected target_blocks.1.mlp.2.weight"):
        load_published(lvsm, published)
    for other in ({"conv1.weight": torch.zeros(1)}, {}):
        with pytest.raises(ValueError, match="not weights of Efficient-LVSM or LVSM; found (conv1.weight|nothing)"):
            from_published(other)
    with pytest.raises(ValueError, match="LVSMDecoderOnlyConfig: the weights have no decoder or no head"):
        published_config({"transformer_input_layernorm.weight": torch.zeros(32)})
