"""REPA: teachers, pairs, the loss and its gradients, and that nothing of it is left after training."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_views, tiny_pipeline
from tiny_training import no_writers_are_left, tiny_trainer  # noqa: F401
from torch import nn
from torch.nn import functional as F

from elvsm_nerfstudio import method_configs
from elvsm_nerfstudio.geometry import CanonicalFrame
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.weights import load_weights, read_weights, save_weights
from elvsm_nerfstudio.training import repa as repa_module
from elvsm_nerfstudio.training.repa import Pair, Repa, RepaConfig, find_pairs, spatial_norm, watch
from elvsm_nerfstudio.training.teachers import VGG16, DINOv2, DINOv3, SaliencyViT, Teacher
from elvsm_nerfstudio.views import Views, ViewSet

CHANNELS = 5
SIZES = dict(width=32, num_layers=3, head_dim=16, mlp_ratio=2)
FRAME = CanonicalFrame.estimate(make_views(2, 2, 16, 24).camera_to_world)


class TinyTeacher(Teacher):
    """Two random convolutions; patches of 4 pixels, of images whose short side is made 12."""

    default_block = 2
    default_image_size = 12

    def __init__(self, blocks, path=None, image_size=None):
        torch.manual_seed(7)
        network = nn.ModuleList([nn.Conv2d(3, CHANNELS, 4, 4), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)])
        super().__init__(network, blocks, CHANNELS, 4, image_size)

    def _features(self, images):
        first = self._to(images.device)[0](images)
        maps = {1: first, 2: self._network[1](first.relu())}
        return {block: maps[block].flatten(2).transpose(1, 2) for block in self.blocks}


@pytest.fixture(autouse=True)
def tiny_teacher(monkeypatch):
    """Takes the place of VGG-16."""
    monkeypatch.setitem(repa_module.TEACHERS, "vgg16", TinyTeacher)


@pytest.fixture
def views() -> ViewSet:
    """Two scenes, two context and three target views; 2 x 3 tokens a view."""
    return ViewSet(make_views(2, 2, 16, 24), make_views(2, 3, 16, 24, seed=1))


def make(network=None, **options) -> tuple[nn.Module, Repa]:
    torch.manual_seed(0)
    network = (network or EfficientLVSMConfig(**SIZES)).build()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)
    return network, Repa(RepaConfig(**{"teacher": "vgg16", "pairs": ("2-2",), **options}), network)


def gradients(*modules: nn.Module) -> list[torch.Tensor]:
    found = [p.grad for module in modules for p in module.parameters()]
    for module in modules:
        module.zero_grad()
    return found


# The loss


def student_features(network, views: ViewSet, block: int) -> dict[str, torch.Tensor]:
    """What a block makes of both streams, block after block; [image, token, d]."""
    context = network._context_tokens(views.context, FRAME).flatten(0, 1)
    for each in network.context_blocks[:block]:
        context = each(context)
    memory = network.encode(views.context, FRAME)
    target = network.target_tokenizer(network._rays(views.target, FRAME))
    for layer, each in enumerate(network.target_blocks[:block]):
        target = each(target, *memory.read(layer))
    return {"context": context, "target": target.flatten(0, 1)}


def plain_distance(found: torch.Tensor, wanted: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "cosine":
        return 1 - (found @ wanted) / (found.norm() * wanted.norm())
    difference = (found - wanted).abs()
    if kind == "l2":
        return (difference**2).mean()
    return torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()


@pytest.mark.parametrize("projector, loss", [("mlp", "smooth-l1"), ("mlp", "l2"), ("mlp", "cosine"), ("conv", "l2")])
def test_loss_and_gradients_against_a_plain_computation(views, projector, loss):
    network, repa = make(projector=projector, loss=loss)
    rgb, found = repa(network, views, FRAME)
    assert torch.equal(rgb, network(views.context, views.target, FRAME))
    found.backward()
    ours = gradients(network, repa)

    losses = []
    for stream, tokens in student_features(network, views, 2).items():
        images = getattr(views, stream).rgb.flatten(0, 1).permute(0, 3, 1, 2)
        # 16 x 24 pixels seen as 12 x 16: 3 x 4 tokens, for the network's 2 x 3
        maps = repa.teacher.features(images)[2].transpose(1, 2).reshape(-1, CHANNELS, 3, 4)
        maps = F.interpolate(maps, (2, 3), mode="bicubic", antialias=True)
        layer = repa.projectors[f"{stream}-2-2"]
        for image, wanted in zip(tokens, maps):
            if projector == "conv":
                for channel in wanted:
                    channel.copy_((channel - 0.6 * channel.mean()) / channel.std(correction=0))
                mine = F.conv2d(image.T.reshape(1, -1, 2, 3), layer.weight, layer.bias, padding=1)[0].flatten(1).T
            else:
                mine = image
                for linear in (layer[0], layer[2], layer[4]):
                    mine = mine @ linear.weight.T + linear.bias
                    mine = mine if linear is layer[4] else mine * torch.sigmoid(mine)
            losses += [plain_distance(a, b, loss) for a, b in zip(mine, wanted.flatten(1).T)]
    assert len(losses) == (4 + 6) * 6  # every token of every image counts alike
    expected = torch.stack(losses).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4) and found > 1e-3
    expected.backward()
    compared = [(a, b) for a, b in zip(ours, gradients(network, repa)) if b is not None]
    assert len(compared) > 20
    for mine, theirs in compared:
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_with_prefixes_it_is_the_mean_of_what_each_target_gives_with_its_own_context(views):
    network, repa = make(pairs=("2-2t",))
    rgb, found = repa(network, views, FRAME, (2, 1, 1))
    expected = []
    for index, length in enumerate((2, 1, 1)):
        one = ViewSet(views.context.select(slice(0, length)), views.target.select([index]))
        image, loss = repa(network, one, FRAME)
        assert torch.allclose(rgb[:, index], image[:, 0], atol=1e-5)
        expected.append(loss)
    assert torch.allclose(found, torch.stack(expected).mean(), rtol=1e-5)
    assert expected[1].item() != pytest.approx(expected[2].item(), rel=1e-3)
    assert found.item() != pytest.approx(repa(network, views, FRAME)[1].item(), rel=1e-5)


def test_teachers_features_come_to_the_tokens_of_the_same_place(views, monkeypatch):
    seen = []
    monkeypatch.setattr(repa_module, "distance", lambda found, wanted, kind: seen.append(wanted) or found.sum())
    network, repa = make(pairs=("1-1t",), image_size=20)
    with torch.no_grad():  # the teacher sees the brightness alone
        repa.teacher._network[0].weight.fill_(1 / 48)
        repa.teacher._network[0].bias.zero_()
    rgb = torch.zeros_like(views.target.rgb) + 0.5
    rgb[:, :, :8, 16:] = 1.0
    rgb[0, :, 8:, :8] = 0.0
    target = Views(views.target.camera_to_world, views.target.directions, views.target.intrinsics, rgb)
    assert repa.teacher.grid(16, 24) == (5, 8)
    repa(network, ViewSet(views.context, target), FRAME)
    (wanted,) = seen
    assert wanted.shape == (6, 2, 3, CHANNELS)
    first, last = wanted[0, ..., 0], wanted[-1, ..., 0]
    assert first.argmax() == 2 and first.argmin() == 3 and last.argmax() == 2
    assert last[0, 2] - last[1, 0] > 5 * (last[1, 0] - last[0, 0]).abs()


def test_spatial_norm_keeps_a_part_of_the_mean():
    maps = torch.randn(2, 4, 5, 3) * 3 + 1
    normed = spatial_norm(maps)
    torch.testing.assert_close(normed.std(dim=(1, 2), correction=0), torch.ones(2, 3), rtol=1e-4, atol=1e-4)
    expected = 0.4 * maps.mean(dim=(1, 2)) / maps.std(dim=(1, 2), correction=0)
    torch.testing.assert_close(normed.mean(dim=(1, 2)), expected)


def test_only_the_watched_blocks_and_those_before_get_gradients(views):
    network, repa = make(pairs=("2-2i",))
    _, loss = repa(network, views, FRAME)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in repa.parameters())
    assert all(p.grad.abs().max() > 0 for p in network.context_blocks[:2].parameters())
    assert all(p.grad is None for p in [*network.context_blocks[2].parameters(), *network.target_blocks.parameters()])
    assert all(not p.requires_grad for p in repa.teacher._network.parameters())
    assert all(
        not x.requires_grad for x in repa.teacher.features(torch.rand(1, 3, 16, 16, requires_grad=True)).values()
    )


def test_gradient_checkpointing_changes_nothing_and_leaves_no_hooks(views):
    network, repa = make(pairs=("2-2", "1-3t"))
    found = []
    for network.gradient_checkpointing in (False, True):
        rgb, loss = repa(network, views, FRAME)
        (rgb.square().mean() + loss).backward()
        found.append((loss.detach(), *gradients(network, repa)))
    for plain, checkpointed in zip(*found):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-5, atol=1e-7)
    assert not any(module._forward_hooks for module in network.modules())


def test_bf16_is_close_to_fp32(views):
    network, repa = make()
    _, exact = repa(network, views, FRAME)
    network.autocast_dtype = torch.bfloat16
    _, rounded = repa(network, views, FRAME)
    assert rounded.dtype == torch.float32 and rounded != exact
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    rounded.backward()
    assert all(p.grad.isfinite().all() for p in repa.parameters())


def test_what_cannot_be_compared_is_refused(views):
    network, repa = make()
    with torch.no_grad(), pytest.raises(ValueError, match="the target views have no rgb"):
        cameras = (views.target.camera_to_world, views.target.directions, views.target.intrinsics)
        repa(network, ViewSet(views.context, Views(*cameras)), FRAME)
    with pytest.raises(RuntimeError, match="found 0 outputs of block 2 of the context stream"):
        repa.loss(network, views, {})
    with watch(network, repa.pairs) as outputs:
        for _ in range(2):
            network(views.context, views.target, FRAME)
    with pytest.raises(RuntimeError, match="found 2 outputs"):
        repa.loss(network, views, outputs)
    assert not any(module._forward_hooks for module in network.modules())


# Pairs


def test_default_pairs_lie_at_a_third_of_the_depth():
    for depth, block in ((6, 2), (12, 4), (4, 1), (1, 1), (24, 8)):
        expected = (Pair(8, block, "context"), Pair(8, block, "target"))
        assert find_pairs((), 8, {"context": depth, "target": depth}) == expected


def test_pairs_are_written_like_the_official_ones():
    depths = {"context": 3, "target": 3}
    both = (Pair(8, 2, "context"), Pair(8, 2, "target"))
    assert find_pairs(("8-2",), 5, depths) == both
    assert find_pairs(("12-3t", "8-1i"), 5, depths) == (Pair(12, 3, "target"), Pair(8, 1, "context"))
    for names, message in (
        (("8",), "expected TEACHERBLOCK-BLOCK"),
        (("8-2x",), "expected TEACHERBLOCK-BLOCK"),
        (("8-4",), "found block 4, expected 1 to 3"),
        (("8-0",), "found block 0, expected 1 to 3"),
        (("8-2", "8-2t"), "8-2t: this pair is there twice"),
    ):
        with pytest.raises(ValueError, match=message):
            find_pairs(names, 5, depths)


@pytest.mark.parametrize("kind", [LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig])
def test_lvsm_has_a_target_stream_alone(views, kind):
    options = {**SIZES, "num_latents": 7} if kind is LVSMEncoderDecoderConfig else SIZES
    network, repa = make(kind(**options), pairs=())
    assert repa.pairs == (Pair(2, 1, "target"),)
    seen = {}
    handle = network.decoder_blocks[0].register_forward_hook(lambda _, inputs, output: seen.update(joint=output))
    rgb, loss = repa(network, views, FRAME)
    handle.remove()
    # Targets' tokens come first in each sequence.
    assert seen["joint"].shape[:2] == (6, 6 + (7 if "num_latents" in options else 12))
    cut = {repa.pairs[0]: [seen["joint"][:, :6]]}
    assert repa.loss(network, views, cut) == loss and loss.requires_grad
    with pytest.raises(ValueError, match=r"2-1: this network has no tokens of context views alone; expected 2-1t"):
        make(kind(**options), pairs=("2-1",))


# In training, and after


def training_pipeline(monkeypatch, collection, test_mode="val", **options):
    model = method_configs.efficient_lvsm_tiny.config.pipeline.model
    monkeypatch.setattr(model, "repa", RepaConfig(**{"teacher": "vgg16", "pairs": ("2-1",), **options}))
    return tiny_pipeline(collection, test_mode)


def test_projectors_are_trained_and_saved_and_forgotten_by_all_that_render(monkeypatch, collection, tmp_path):
    pipeline = training_pipeline(monkeypatch, collection, weight=0.25)
    model = pipeline.model
    views, batch = pipeline.datamanager.next_train(0)
    model.train()
    outputs = model(views)
    losses = model.get_loss_dict(outputs, batch)
    assert losses["repa"] == 0.25 * outputs["repa"]
    sum(losses.values()).backward()
    (group,) = model.get_param_groups().values()
    assert {id(p) for p in group} == {id(p) for p in (*model.network.parameters(), *model.repa.parameters())}
    assert all(p.grad is not None for p in group)
    torch.optim.SGD(group, lr=0.1).step()
    model.eval()
    assert set(model(views)) == {"rgb"} and set(model.get_loss_dict(model(views), batch)) == {"mse"}

    saved = {name: x.clone() for name, x in pipeline.state_dict().items()}
    assert sum(name.startswith("_model.repa.projectors.") for name in saved) == 2 * 6
    assert not any("repa" in name or "teacher" in name for name in model.network.state_dict())
    resumed = training_pipeline(monkeypatch, collection)
    resumed.load_pipeline(saved, 0)
    assert all(torch.equal(x, saved[name]) for name, x in resumed.state_dict().items())

    def no_teacher(*args):
        raise AssertionError("rendering needs no teacher")

    monkeypatch.setitem(repa_module.TEACHERS, "vgg16", no_teacher)
    camera = pipeline.datamanager.eval_dataset.cameras[:1]
    rendered = model.get_outputs_for_camera(camera)["rgb"]
    viewing = training_pipeline(monkeypatch, collection, "test")
    viewing.load_pipeline(saved, 0)
    viewing.model.set_context(ViewSet(model._context.views, views.target))
    assert torch.equal(viewing.model.get_outputs_for_camera(camera)["rgb"], rendered)
    assert not any("repa" in name for name in viewing.state_dict())
    with pytest.raises(ValueError, match=r"unexpected repa\.other"):
        viewing.load_pipeline({**saved, "_model.repa.other": torch.zeros(1)}, 0)

    # Exported: the same network, without and with REPA, from a run's checkpoint.
    torch.save({"step": 0, "pipeline": saved}, tmp_path / "step-000000000.ckpt")
    weights = read_weights(tmp_path / "step-000000000.ckpt")
    save_weights(tmp_path / "weights.safetensors", weights.state, model.config.network)
    assert set(read_weights(tmp_path / "weights.safetensors").state) == set(model.network.state_dict())
    network = model.config.network.build().eval()
    load_weights(network, tmp_path / "weights.safetensors")
    with torch.no_grad():
        frame = model.frame_of(views)
        exported, ours = (each(views.context, views.target, frame) for each in (network, model.network))
    assert torch.equal(exported, ours)


def test_averaged_weights_beside_projectors(monkeypatch, collection, tmp_path):
    model_config = method_configs.efficient_lvsm_tiny.config.pipeline.model
    monkeypatch.setattr(model_config, "repa", RepaConfig("vgg16", pairs=("2-1",)))
    options = dict(ema_decay=0.5, max_num_iterations=3)
    trainer = tiny_trainer(tmp_path, collection, **options)
    projectors = {name: p.clone() for name, p in trainer.pipeline.model.repa.named_parameters()}
    for step in range(2):
        trainer.train_iteration(step)
    trainer.save_checkpoint(1)
    saved = trainer.checkpoint_dir / "step-000000001.ckpt"
    assert set(read_weights(saved).state) == set(trainer.average.network.state_dict())
    resumed = tiny_trainer(tmp_path, collection, load_checkpoint=saved, **options)
    for name, p in resumed.pipeline.model.repa.named_parameters():
        assert torch.equal(p, trainer.pipeline.model.repa.get_parameter(name)), name
        assert not torch.equal(p, projectors[name]), name
    for name, tensor in resumed.average.network.state_dict().items():
        assert torch.equal(tensor, trainer.average.network.get_parameter(name)), name
        assert not torch.equal(tensor, resumed.pipeline.model.network.get_parameter(name)), name


def test_ddp_sees_the_projectors(monkeypatch, collection, tmp_path):
    pipeline = training_pipeline(monkeypatch, collection)
    model = pipeline.model.train()
    views, batch = pipeline.datamanager.next_train(0)

    def step(forward) -> list[torch.Tensor]:
        sum(model.get_loss_dict(forward(views), batch).values()).backward()
        return gradients(model.network, model.repa)

    expected = step(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = step(nn.parallel.DistributedDataParallel(model, find_unused_parameters=True))
    finally:
        dist.destroy_process_group()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_resuming_with_other_pairs_is_refused(monkeypatch, collection):
    saved = training_pipeline(monkeypatch, collection).state_dict()
    other = training_pipeline(monkeypatch, collection, pairs=("2-2",))
    with pytest.raises(ValueError, match=r"missing repa\.projectors\.context-2-2"):
        other.load_pipeline(saved, 0)


def test_the_network_starts_the_same_with_and_without(monkeypatch, collection):
    with_repa = training_pipeline(monkeypatch, collection).model.network
    without = training_pipeline(monkeypatch, collection, teacher="none").model
    assert without.repa is None
    assert all(torch.equal(p, q) for p, q in zip(with_repa.parameters(), without.network.parameters()))


# Teachers


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory) -> Path:
    """VGG-16 with random weights; no classifier."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    layers = make_layers(cfgs["D"])
    torch.save({f"features.{name}": x * 1.8 for name, x in layers.state_dict().items()}, path)
    return path


def test_vgg16_is_torchvisions_relu5_3(vgg_file):
    from torchvision.models.vgg import cfgs, make_layers

    teacher = VGG16([5], vgg_file)
    images = torch.rand(1, 3, 64, 96)
    assert VGG16([5], vgg_file, image_size=32).grid(64, 96) == (2, 3) and teacher.grid(64, 96) == (16, 24)
    found = VGG16([5], vgg_file, image_size=64).features(images)[5]
    layers = make_layers(cfgs["D"])
    layers.load_state_dict({k.removeprefix("features."): x for k, x in torch.load(vgg_file).items()})
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = layers[:30]((images - mean) / std)
    assert expected.std() > 1e-3 and (expected >= 0).all()
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-5)


def test_missing_weights_stop_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af.pth[^\0]*elvsm fetch lpips"):
        VGG16([5])
    with pytest.raises(FileNotFoundError, match=r"found nothing; expected a folder[^\0]*hf download .*dinov3-vitb16"):
        DINOv3([8])
    with pytest.raises(FileNotFoundError, match=r"holds no config.json[^\0]*hf download facebook/dinov2-base"):
        DINOv2([8], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"saliency-vit-s, which holds no[^\0]*elvsm fetch saliency-vit"):
        SaliencyViT([8])
    with pytest.raises(ValueError, match=r"found blocks \[4\] of teacher 'vgg16', it has \[5\]"):
        VGG16([4, 5])


TINY = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2)


@pytest.fixture(scope="module")
def transformers():
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def dinov3(transformers, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.DINOv3ViTConfig(**TINY, intermediate_size=48, patch_size=16, num_register_tokens=4)
    path = tmp_path_factory.mktemp("dinov3")
    transformers.DINOv3ViTModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def dinov2(transformers, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dinov2")
    config = transformers.Dinov2Config(**TINY, mlp_ratio=2, patch_size=14, image_size=56)
    transformers.Dinov2Model(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind, size, special", [(DINOv3, (48, 32), 5), (DINOv2, (42, 28), 1)], ids=["v3", "v2"])
def test_transformers_blocks_are_given_without_special_tokens(request, transformers, kind, size, special):
    path = request.getfixturevalue(kind.name)
    teacher = kind([2, 1], path, image_size=size[1])
    assert teacher.grid(*size) == (3, 2) and teacher.channels == 24
    images = torch.rand(2, 3, *size)
    whole = getattr(transformers, kind.architecture).from_pretrained(path).eval()
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = whole((images - mean) / std, output_hidden_states=True).hidden_states
    found = teacher.features(images)
    assert sorted(found) == [1, 2] and expected[2].shape == (2, 6 + special, 24)
    for block, features in found.items():
        assert features.shape == (2, 6, 24) and features.std() > 1e-2
        torch.testing.assert_close(features, expected[block][:, special:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[1], found[2])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = teacher.features(images)[2]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, found[2], rtol=0.05, atol=0.05)


def test_images_are_shown_at_the_teachers_own_size(dinov2, dinov3):
    assert DINOv3([1], dinov3).grid(256, 256) == (32, 32)  # one token of ours each, as in the paper
    assert DINOv2([1], dinov2).grid(256, 256) == (24, 24)
    assert DINOv2([1], dinov2).grid(270, 480) == (24, 43)


def test_another_model_is_never_taken_for_a_teacher(dinov2, dinov3):
    with pytest.raises(ValueError, match="found model_type dinov2, fine_tuned_for None; expected dinov3_vit, None"):
        DINOv3([1], dinov2)
    with pytest.raises(ValueError, match="expected dinov2, saliency for teacher 'saliency-vit-s'"):
        SaliencyViT([1], dinov2)
    with pytest.raises(ValueError, match=r"found blocks \[8\] of teacher 'dinov3', it has \[1, 2, 3\]"):
        DINOv3([1, 8], dinov3)


def test_training_with_a_transformer(dinov3, views):
    network, repa = make(teacher="dinov3", path=dinov3, pairs=("3-2i", "1-1"), image_size=32)
    _, loss = repa(network, views, FRAME)
    loss.backward()
    assert loss > 0 and all(p.grad.abs().max() > 0 for p in repa.parameters())
    assert not any("_network" in name or "teacher" in name for name in repa.state_dict())


def test_the_vit_is_read_from_onnx(transformers, dinov2, tmp_path, monkeypatch):
    """A tiny one, with the names that the true one has in its file."""
    pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    from elvsm_nerfstudio.downloads import saliency_vit as script

    state = {k: x.numpy() for k, x in transformers.Dinov2Model.from_pretrained(dinov2).state_dict().items()}
    constants, nodes = [], []
    for name, array in state.items():
        if name == "embeddings.position_embeddings":
            for kind, part in (("Concat", array[:, :1]), ("Reshape", array[:, 1:])):
                constants.append(numpy_helper.from_array(part, f"onnx::{kind}"))
                nodes.append(helper.make_node(kind, ["x", f"onnx::{kind}"], ["y"], f"/backbone/embeddings/{kind}_1"))
        elif name.startswith("encoder") and array.ndim == 2:
            module = "/backbone/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            constants.append(numpy_helper.from_array(array.T.copy(), f"onnx::MatMul_{len(constants)}"))
            nodes.append(helper.make_node("MatMul", ["x", constants[-1].name], ["y"], f"{module}/MatMul"))
        elif "mask_token" not in name:
            constants.append(numpy_helper.from_array(array, f"backbone.{name}"))
    model = helper.make_model(helper.make_graph(nodes, "vit", [], [], constants))
    monkeypatch.setattr(script, "HEAD_DIM", 12)
    read = script.backbone_weights(model.SerializeToString())
    assert set(read) == set(state) - {"embeddings.mask_token"}
    (tmp_path / "vit").mkdir()
    script.write_folder(tmp_path / "vit", read)
    images = torch.rand(1, 3, 42, 56)
    found, expected = (t.features(images)[3] for t in (SaliencyViT([3], tmp_path / "vit"), DINOv2([3], dinov2, 224)))
    torch.testing.assert_close(found, expected)
    assert script.fetch(tmp_path / "vit", Path("nowhere")) == tmp_path / "vit"  # there already
