import pytest
import torch

from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM, EfficientLVSMConfig
from elvsm_nerfstudio.nn.published_weights import from_published, load_published, read_published, to_published

CONFIG = EfficientLVSMConfig(width=32, num_layers=2, head_dim=16)


def networks() -> tuple[EfficientLVSM, EfficientLVSM]:
    return EfficientLVSM(CONFIG), EfficientLVSM(CONFIG)


def test_round_trip_through_the_official_layout():
    source, target = networks()
    published = to_published(source.state_dict())
    assert "self_cross_blocks.1.cross_attn.to_kv.weight" in published and len(published) == len(source.state_dict())
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
    with pytest.raises(ValueError, match="unexpected entries: transformer_blocks.0.attn.fc.weight"):
        from_published({"transformer_blocks.0.attn.fc.weight": torch.zeros(1)})


def test_checkpoint_files_are_read_without_executing_code(tmp_path):
    source, target = networks()
    torch.save({"model": to_published(source.state_dict()), "epoch": 3}, tmp_path / "published.pt")
    load_published(target, read_published(tmp_path / "published.pt"))
    assert torch.equal(source.head.weight, target.head.weight)
    torch.save({"model": "not weights"}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="wrong.pt: expected a state dict"):
        read_published(tmp_path / "wrong.pt")
