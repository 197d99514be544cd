"""On a pretended CUDA device no tensor is left on the CPU, from loader to metrics, and results are the CPU's."""

from __future__ import annotations

import functools
import json
import threading
import traceback
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace

import pretended_cuda as device_module
import pytest
import torch
from conftest import make_views, random_poses, tiny_pipeline, write_scene
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from pretended_cuda import PretendedTensor, launches, pretended_cuda, waits, without_a_gpu
from test_metrics import images, random_states, random_weights, torch_home  # noqa: F401
from test_network import random_network
from test_plane_sweep import cameras, photos, posed
from test_rasterizer import render as rasterize
from test_rasterizer import scene as gaussians
from test_repa import TinyTeacher
from test_viewer import Session
from tiny_training import no_writers_are_left, tiny_config  # noqa: F401
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elvsm_nerfstudio import trainer as training_run
from elvsm_nerfstudio.data.samples import Sample
from elvsm_nerfstudio.evaluation import metrics
from elvsm_nerfstudio.evaluation.baselines import BASELINES
from elvsm_nerfstudio.evaluation.evaluator import Evaluation, Evaluator
from elvsm_nerfstudio.evaluation.protocols import find_protocol
from elvsm_nerfstudio.evaluation.scored_network import ScoredNetwork
from elvsm_nerfstudio.method_configs import splatfacto_lvsm, splatfacto_sparse
from elvsm_nerfstudio.model import EfficientLVSMModel, EfficientLVSMModelConfig
from elvsm_nerfstudio.nn import kernels
from elvsm_nerfstudio.nn.compiled import CapturedFrames
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSMConfig
from elvsm_nerfstudio.nn.kernels import recomputed
from elvsm_nerfstudio.nn.lvsm import LVSMDecoderOnlyConfig, LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.memory import load_memory
from elvsm_nerfstudio.nn.rounded import RoundedCopy
from elvsm_nerfstudio.nn.weights import save_weights
from elvsm_nerfstudio.splatting.lens import undistort
from elvsm_nerfstudio.splatting.plane_sweep import PosedImages, surface_points
from elvsm_nerfstudio.training import repa
from elvsm_nerfstudio.training.checkpoints import list_checkpoints, read_checkpoint
from elvsm_nerfstudio.training.ema import WeightAverage
from elvsm_nerfstudio.training.muon import mark_hidden
from elvsm_nerfstudio.training.optimizers import AdamWOptimizerConfig
from elvsm_nerfstudio.training.perceptual import VGG_TERMS, LPIPSLoss, VGGLoss
from elvsm_nerfstudio.training.repa import RepaConfig
from elvsm_nerfstudio.training.vgg_files import DEPTHS, WIDTHS
from elvsm_nerfstudio.viewer.attention_maps import decode_with_attention
from elvsm_nerfstudio.viewer.context_pool import ContextPool
from elvsm_nerfstudio.views import ViewSet

pytestmark = without_a_gpu

SIZES = dict(width=32, num_layers=2, head_dim=16)


@pytest.fixture
def cuda():
    with pretended_cuda() as device:
        yield device


# The device itself


class LeavesTheDevice(torch.autograd.Function):
    """Whose gradient is on the CPU."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient.cpu()


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.isin(x.long(), torch.tensor([1, 9])),
        lambda x: x + torch.ones(3),
        lambda x: torch.where(torch.ones(3, dtype=torch.bool), x, 0.0),
        lambda x: torch.stack([x.sum(), torch.tensor(0.0)]),
        lambda x: x @ torch.ones(3),
        lambda x: torch.tensor(0.0).add_(x.sum()),
        lambda x: x.gather(0, torch.tensor([0])),
        lambda x: torch.ones(3)[x.long()],
        lambda x: x.index_put_((torch.tensor([0, 1]),), torch.ones(2)),
        lambda x: x.uniform_(generator=torch.Generator()),
        lambda x: torch.rand(3, generator=torch.Generator(), device="cuda"),
        lambda x: nn.Linear(3, 2)(x),
        lambda x: LeavesTheDevice.apply(x.requires_grad_()).sum().backward(),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: x.numpy(),
    ],
)
def test_what_cuda_refuses_is_refused(cuda, operation):
    with pytest.raises((RuntimeError, TypeError), match="same device|device type|expected cuda|nobody waits"):
        operation(torch.ones(3, device="cuda"))


def test_what_cuda_lets_meet_may_meet(cuda):
    x = torch.tensor([3.0, 1.0, 2.0], device="cuda")
    number, index = torch.tensor(2.0), torch.tensor([0, 2])
    for found in (x * number, number - x, x[index], x[[0, 2]], x[torch.tensor([True, False, True])], x.new_tensor([1])):
        assert isinstance(found, PretendedTensor) and found.device == cuda and found.is_cuda
    x[1:] = torch.tensor([5.0, 6.0])
    x[index] = number
    assert x.tolist() == [2.0, 5.0, 2.0] and float(x.sum()) == 9.0 and not (x > 2).all()
    assert type(x.cpu()) is type(x.to(torch.ones(1))) is Tensor and torch.ones(1).to(x).is_cuda
    assert x.to("cuda") is x and torch.empty(0, device="cuda").device == cuda


def test_waits_for_the_device_are_noted(cuda):
    x, index = torch.tensor([3.0, 1.0, 2.0], device="cuda"), torch.tensor([0, 2], device="cuda")
    with waits() as none:
        y = (x[index] + x.new_ones(2)).clamp(0, 1).to(torch.bfloat16)
        torch.ones(3).to("cuda", non_blocking=True).copy_(x), y.fill_(2.0), x[1:], x.mean().sqrt()
    waiting = [
        *(lambda: x.tolist(), lambda: x.sum().item(), lambda: bool((x > 2).any()), lambda: x.cpu(), lambda: int(x[0])),
        *(lambda: x.unique(), lambda: x[x > 2], lambda: x.nonzero(), lambda: x.new_tensor([1.0]), lambda: x[[0, 2]]),
        *(lambda: torch.ones(3).to("cuda"), lambda: torch.linalg.inv(x.diag()), lambda: x.numpy(force=True)),
    ]
    assert not none
    for number, operation in enumerate(waiting):
        with waits() as found:
            operation()
        assert found and all("test_devices.py" in line for line in found), number


def test_gradients_are_those_of_the_cpu(cuda):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 5))
    weight, x = torch.randn(4, 5), torch.randn(2, 7, 6)

    def gradients(device: str) -> list[Tensor]:
        network.zero_grad()
        last = weight.to(device, copy=True).requires_grad_()
        y = recomputed(nn.functional.linear, network.to(device)(x.to(device)), last)
        queries, keys, values = y.view(2, 1, 7, 4), y.view(2, 1, 7, 4).flip(2), (y * y).view(2, 1, 7, 4)
        out = nn.functional.scaled_dot_product_attention(queries, keys, values)
        (out.std(dim=2).sum() + y[0].amax(dim=0).sum()).backward()
        return [last.grad.cpu(), *(parameter.grad.cpu() for parameter in network.parameters())]

    expected, first = gradients("cpu"), network[0].weight
    found = gradients("cuda")
    assert network[0].weight is first and first.is_cuda and isinstance(first, nn.Parameter) and first.grad.is_cuda
    torch.testing.assert_close(found, expected)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert network[0](x.to("cuda")).dtype == torch.bfloat16


# Training


def test_the_loaders_rays_are_made_on_the_device(cuda):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(2, 3, 25, generator=generator)
    rows[..., :12] = torch.eye(4)[:3].flatten() + 0.1 * rows[..., :12]
    rows[..., 12:16] = torch.tensor([20.0, 20.0, 12.0, 8.0])
    rows[..., 16:22] *= 0.01
    rows[..., 22:24] = torch.tensor([16.0, 24.0])
    rows[0, :, 24], rows[1, :, 24] = 1, 2  # perspective and fisheye
    rgb = torch.randint(256, (2, 3, 16, 24, 3), generator=generator).byte()
    sample = Sample(rgb, rows, num_context_views=2, failures=[])
    found, expected = sample.view_set("cuda"), sample.view_set("cpu")
    for mine, theirs in zip((found.context, found.target), (expected.context, expected.target)):
        for name in ("camera_to_world", "directions", "intrinsics", "rgb"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert a.is_cuda and torch.equal(a.cpu(), b)


def test_a_batch_of_pinhole_cameras_is_made_without_waiting(cuda, collection):
    datamanager = tiny_pipeline(collection, "val", device="cuda").datamanager
    with waits() as found:
        views, batch = datamanager.next_train(0)
    assert views.context.directions.is_cuda and batch["image"].is_cuda and not found


def training_step(config: EfficientLVSMModelConfig, device: str, muon: bool) -> tuple[dict[str, float], list[Tensor]]:
    """Losses of a step, and the weights after it, averaged and not."""
    torch.manual_seed(0)
    model = config.setup(scene_box=None, num_train_data=1).to(device).train()
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(3)
    average = WeightAverage(model.network, decay=0.5)
    optimizer = AdamWOptimizerConfig(lr=1e-3, muon=muon).setup(params=model.get_param_groups()["network"])
    model.generator.manual_seed(0)
    views = ViewSet(make_views(2, 3, 16, 24), make_views(2, 3, 16, 24, seed=1)).to(device)
    batch = {"image": views.target.rgb}
    outputs = model(views)
    losses = model.get_loss_dict(outputs, batch, model.get_metrics_dict(outputs, batch))
    functools.reduce(torch.add, losses.values()).backward()
    optimizer.step()
    average.update(model.network)
    assert all(p.device.type == p.grad.device.type == device for p in model.network.parameters())
    networks = model.network, average.network
    return {k: v.item() for k, v in losses.items()}, [p.detach().cpu() for n in networks for p in n.parameters()]


PROPE = dict(camera_encoding="prope", num_layers=1, width=32, head_dim=16)
TRAININGS = {
    "plain": (EfficientLVSMConfig(**SIZES), dict(canonical_frame="context+target")),
    "muon": (EfficientLVSMConfig(**SIZES), dict(psnr_loss=True)),
    "prefixes": (
        EfficientLVSMConfig(**PROPE, ray_frame="camera"),
        dict(psnr_loss=True, prefix_loss=True),
    ),
    "checkpointing": (EfficientLVSMConfig(**PROPE), dict(gradient_checkpointing=True)),
    "repa": (EfficientLVSMConfig(**SIZES), dict(repa=RepaConfig(teacher="vgg16", pairs=("1-1", "2-2t")))),
    "bf16": (EfficientLVSMConfig(**PROPE, ray_frame="camera"), dict(precision="auto", prefix_loss=True)),
    "decoder only": (LVSMDecoderOnlyConfig(**SIZES), {}),
    "encoder-decoder": (LVSMEncoderDecoderConfig(**SIZES, num_latents=5), {}),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_step_is_that_of_the_cpu(cuda, name, monkeypatch):
    monkeypatch.setitem(repa.TEACHERS, "vgg16", TinyTeacher)
    network, options = TRAININGS[name]
    options = {"precision": "fp32", **options}
    config, muon = EfficientLVSMModelConfig(network=network, **options), name == "muon"
    losses, weights = training_step(config, "cuda", muon)
    config.precision = "fp32" if options["precision"] == "fp32" else "bf16"
    expected_losses, expected_weights = training_step(config, "cpu", muon)
    assert losses == pytest.approx(expected_losses, rel=1e-4 if config.precision == "fp32" else 0.02)
    # AdamW's first step is about the sign of a gradient, of which rounding may decide.
    agree = [torch.isclose(a, b, atol=2e-4).float() for a, b in zip(weights, expected_weights)]
    assert torch.cat([x.flatten() for x in agree]).mean() > (0.99 if config.precision == "fp32" else 0.8)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), 1e3])
def test_steps_are_taken_and_skipped_without_waiting(cuda, muon, bad):
    def train(device: str) -> tuple[list[Tensor], dict]:
        torch.manual_seed(0)
        network = EfficientLVSMConfig(**SIZES).build().to(device)
        mark_hidden(network)
        optimizer = AdamWOptimizerConfig(muon=muon, clip_norm=1.0, max_skips_in_a_row=4).setup(network.parameters())
        for step, factor in enumerate((bad, 1e-3, bad, 1e-2)):
            for p in network.parameters():
                p.grad = factor * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(device)
            with waits() as found:
                optimizer.step()
            assert len(found) == (device == "cuda" and step == 3), "a look at the counts in four steps"
        assert optimizer.surely_skipped is False
        return [p.detach().cpu() for p in network.parameters()], optimizer.state_dict()

    (found, state), (expected, expected_state) = train("cuda"), train("cpu")
    torch.testing.assert_close(found, expected)
    assert state["counts"] == expected_state["counts"]
    assert state["counts"] == {"skipped_steps": 2, "nonfinite_steps": 0 if bad > 0 else 2, "skips_in_a_row": 0}
    for mine, theirs in zip(state["state"].values(), expected_state["state"].values()):
        for name in theirs:
            torch.testing.assert_close(mine[name].cpu(), theirs[name])


def test_a_gpu_that_skips_every_step_stops_the_training(cuda):
    parameter = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = AdamWOptimizerConfig(max_skips_in_a_row=3).setup([parameter])
    parameter.grad = torch.full((3,), torch.nan, device="cuda")
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="3 steps in a row were skipped: gradient norm nan"):
        optimizer.step()


def test_checkpoints_are_written_while_training_goes_on(cuda, collection, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, collection, max_num_iterations=9, save_only_latest_checkpoint=False)
    config.machine.device_type = "cuda"
    trainer = config.setup()
    trainer.setup()
    write, go_on = training_run.write_checkpoint, threading.Event()
    monkeypatch.setattr(training_run, "write_checkpoint", lambda path, state: go_on.wait() and write(path, state))
    trainer.train_iteration(0)
    expected = {name: x.cpu().clone() for name, x in trainer.pipeline.model.network.state_dict().items()}
    trainer.save_checkpoint(0)
    trainer.train_iteration(1)
    assert not list_checkpoints(trainer.checkpoint_dir)
    go_on.set()
    trainer.training_state = "completed"
    trainer.save_checkpoint(1)
    first, second = map(read_checkpoint, list_checkpoints(trainer.checkpoint_dir))
    assert (first["step"], second["step"]) == (0, 1)
    for name, weights in expected.items():
        assert torch.equal(first["pipeline"][f"_model.network.{name}"], weights), name
    name = "_model.network.head.weight"
    assert not torch.equal(first["pipeline"][name], second["pipeline"][name])


@pytest.mark.parametrize("muon", [False, True])
def test_an_iteration_is_trained_without_waiting(cuda, collection, tmp_path, muon):
    config = tiny_config(tmp_path, collection, ema_decay=0.5)
    config.machine.device_type = "cuda"
    config.logging.steps_per_log = 2
    config.optimizers["network"]["optimizer"].muon = muon
    trainer = config.setup()
    trainer.setup()
    trainer.train_iteration(0)
    before = [p.detach().cpu().clone() for p in trainer.pipeline.model.parameters()]
    with waits() as found:
        trainer.train_iteration(1)
        for callback in trainer.callbacks:
            callback.run_callback_at_location(1, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
    assert not found
    assert not all(torch.equal(p.detach().cpu(), q) for p, q in zip(trainer.pipeline.model.parameters(), before))


def test_the_share_of_the_peak_is_logged(cuda, collection, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, collection)
    config.machine.device_type = "cuda"
    config.logging.steps_per_log = 2
    trainer = config.setup()
    trainer.setup()
    logged = {}
    monkeypatch.setattr(training_run.writer, "put_scalar", lambda name, scalar, step: logged.update({name: scalar}))
    for step in range(3):
        trainer.pipeline.datamanager.seconds_waited = 0.5
        trainer.train_iteration(step)
    flops = trainer._flops.of_step(trainer.pipeline.model.network, trainer.pipeline.datamanager.views)
    expected = flops / 2 * logged["throughput/scenes_per_second"] / 989e12
    assert flops > 1e6 and logged["throughput/share_of_peak"] == pytest.approx(expected)
    assert 0.5 < logged["throughput/data_wait_seconds"] < 1  # of an iteration, not of both


def test_perceptual_losses_move_to_the_device(cuda):
    torch.manual_seed(0)
    convolutions = [
        [(0.05 * torch.randn(width, width if i else before, 3, 3), torch.zeros(width)) for i in range(depth)]
        for before, width, depth in zip((3, *WIDTHS), WIDTHS, DEPTHS["vgg16"])
    ]
    prediction, truth = torch.rand(2, 1, 16, 16, 3)
    for loss in (VGGLoss(convolutions, VGG_TERMS["vgg16"]), LPIPSLoss(convolutions)):
        expected = float(loss(prediction, truth))
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
            loss.to(cuda, dtype)
            on_cuda = prediction.to(cuda).requires_grad_()
            found = loss(on_cuda, truth.to(cuda))
            found.backward()
            assert found.item() == pytest.approx(expected, rel=tolerance) and on_cuda.grad.is_cuda
            del found


def test_a_run_is_trained_saved_and_gone_on_with(cuda, collection, tmp_path):
    def trainer(iterations: int, **options):
        config = tiny_config(tmp_path, collection, ema_decay=0.5, max_num_iterations=iterations, **options)
        config.machine.device_type = "cuda"
        trainer = config.setup()
        trainer.setup()
        return trainer

    first = trainer(2, log_gradients=True)
    first.train()
    again = trainer(3, load_dir=first.checkpoint_dir)
    for mine, theirs in zip(again.average.network.parameters(), first.average.network.parameters()):
        assert mine.is_cuda and torch.equal(mine, theirs)
    again.train()
    assert all(p.is_cuda for p in again.pipeline.model.parameters())


def test_views_come_back_to_the_cpu(cuda):
    views = make_views(1, 2, 8, 8)
    assert torch.equal(views.to("cuda").to("cpu").rgb, views.rgb)


# The memory


@torch.no_grad()
@pytest.mark.parametrize("config", [EfficientLVSMConfig(**SIZES), EfficientLVSMConfig(**PROPE, ray_frame="camera")])
def test_views_come_and_go_on_the_device(cuda, config, tmp_path):
    network = random_network(config)
    context, more, target = make_views(2, 4, 16, 16), make_views(2, 2, 24, 16, seed=1), make_views(2, 3, 16, 16, seed=2)

    def renders(device: str) -> list[Tensor]:
        network.to(device)
        first, second, cameras = (views.to(device) for views in (context, more, target))
        network.chunk_tokens = 8
        memory = network.append(network.encode(first), second)
        found = [network.decode(memory, cameras), network.decode(memory, cameras, nearest_views=2)]
        found += decode_with_attention(network, memory, cameras)
        left = memory.drop([1, 4]).select([5, 0, 3])
        left.save(tmp_path / "memory")
        read = load_memory(tmp_path / "memory", network)
        grown = network.append(left.reserve(100), first.select([1]))
        memories = (left, read, grown)
        assert all(m.device.type == m.camera_to_world.device.type == device for m in memories)
        found += [network.decode(m, cameras) for m in memories]
        assert all(x.device.type == device for x in found)
        return [x.cpu() for x in found]

    torch.testing.assert_close(renders("cuda"), renders("cpu"), atol=1e-5, rtol=1e-4)


# Evaluation and renders


def test_an_evaluation_is_that_of_the_cpu(cuda, collection, tmp_path):
    incremental = find_protocol("incremental")
    rule = replace(incremental.views, num_context_views=2, num_target_views=2)
    protocol = replace(incremental, context_views=(1, 2), views=rule)

    def evaluate(device: str) -> Evaluation:
        pipeline = tiny_pipeline(collection, device=device)
        return Evaluator(ScoredNetwork(pipeline.model), pipeline.datamanager, protocol).run(
            tmp_path / device, get_std=True
        )

    found, expected = evaluate("cuda"), evaluate("cpu")
    assert found.record == expected.record and found.timing["device"] == "cuda:0"
    assert found.timing["frames_per_call"] == 16 and expected.timing["frames_per_call"] == 1
    for count, averages in expected.by_views.items():
        assert found.by_views[count] == pytest.approx(averages, rel=1e-3, abs=1e-6)
    names = (sorted(p.name for p in (tmp_path / device).rglob("*.png")) for device in ("cuda", "cpu"))
    assert next(names) == next(names)


def test_a_path_that_ns_render_asks_for_is_rendered_in_few_calls(cuda, scene, monkeypatch):
    monkeypatch.setattr("elvsm_nerfstudio.model.running_program", lambda: "ns-render")
    calls, render_frames = [], EfficientLVSMModel.render_frames
    monkeypatch.setattr(
        EfficientLVSMModel, "render_frames", lambda self, m, c: calls.append(len(c)) or render_frames(self, m, c)
    )

    def frames(device: str) -> list[Tensor]:
        pipeline = tiny_pipeline(scene, device=device)
        poses = random_poses(20, torch.Generator().manual_seed(0))[:, :3]
        poses[3:5] = poses[2]  # a path may stand still
        path = Cameras(poses, 40.0, 40.0, 15.0, 12.0, 24, 16).to(device)
        with torch.no_grad():
            return [pipeline.model.get_outputs_for_camera(path[i : i + 1])["rgb"].cpu() for i in range(20)]

    expected = frames("cpu")
    assert calls == [1] * 20
    calls.clear()
    torch.testing.assert_close(frames("cuda"), expected, atol=1e-5, rtol=1e-4)
    assert calls == [16, 4]


def test_scores_during_training(cuda, collection):
    pipeline = tiny_pipeline(collection, "val", device="cuda")
    assert float(pipeline.get_eval_loss_dict(0)[1]["mse"]) > 0
    scores, pictures = pipeline.get_eval_image_metrics_and_images(0)
    assert scores["psnr"] > 0 and pictures["views"].isfinite().all()
    camera, batch = pipeline.datamanager.next_eval_image(0)
    outputs = pipeline.model.get_outputs_for_camera(camera)
    assert pipeline.model.get_image_metrics_and_images(outputs, batch)[0]["psnr"] > 0


def test_all_metrics_and_baselines_take_images_of_the_device(cuda, random_weights):  # noqa: F811
    prediction, truth = images(40, 40)
    expected = metrics.image_metrics(prediction, truth)
    found = metrics.image_metrics(prediction.to(cuda), truth.to(cuda))
    assert len(found) == 5 and found == pytest.approx(expected, rel=1e-4)
    views = make_views(2, 3, 16, 16), make_views(2, 2, 16, 16, seed=1)
    for baseline in BASELINES.values():
        assert torch.equal(baseline(*(v.to(cuda) for v in views)).cpu(), baseline(*views))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_camera_is_rendered_as_on_the_cpu(cuda, scene, precision):
    found = []
    for device in ("cuda", "cpu"):
        pipeline = tiny_pipeline(scene, device=device)
        model, pool = pipeline.model, ContextPool.of_shown_scene(pipeline.datamanager)
        model.set_precision(precision)
        pose = pipeline.datamanager.eval_dataset.cameras.camera_to_worlds[0]
        lens = dict(fx=30.0, fy=30.0, cx=16.0, cy=10.0, height=20, width=33, distortion_params=torch.zeros(6))
        for kind in (CameraType.PERSPECTIVE, CameraType.FISHEYE):
            for nearest in (None, 1):
                model.config.nearest_views = nearest
                outputs = model.get_outputs_for_camera(Cameras(pose, **lens, camera_type=kind))
                assert outputs["depth"].device.type == model.get_rgba_image(outputs).device.type == device
                found.append(outputs["rgb"].cpu())
        new = next(frame for frame in pool.frames if frame not in model.context_ids)
        model.edit_context(pool.read(new), [new], drop=model.context_ids[:1])
        found.append(model.get_outputs_for_camera(Cameras(pose, **lens))["rgb"].cpu())
    tolerance = 1e-5 if precision == "fp32" else 0.03
    torch.testing.assert_close(found[:5], found[5:], atol=tolerance, rtol=0)


def test_blocks_are_compiled_on_the_device_unless_told_otherwise(cuda):
    def compiler(compile: bool | None):
        config = EfficientLVSMModelConfig(network=EfficientLVSMConfig(**SIZES), compile=compile)
        return config.setup(scene_box=None, num_train_data=1).to(cuda).network.compiler

    assert compiler(None).required is False and compiler(True).required is True and compiler(False) is None


@pytest.mark.parametrize("config", [EfficientLVSMConfig(**SIZES), EfficientLVSMConfig(**PROPE, ray_frame="camera")])
def test_a_frame_is_rendered_without_waiting(cuda, config):
    model = EfficientLVSMModelConfig(network=config).setup(scene_box=None, num_train_data=1).to(cuda).eval()
    model.set_context(ViewSet(make_views(1, 2, 16, 24), make_views(1, 1, 16, 24, seed=1)))
    camera = Cameras(torch.eye(4)[:3], 30.0, 30.0, 16.0, 10.0, 33, 20, torch.zeros(6))
    memory = model.memory()
    with waits() as found:
        assert model.render(memory, camera)["rgb"].is_cuda
    assert not found
    camera = camera.to("cuda")  # as ns-render and the viewer give it
    with waits() as found:
        model.get_outputs_for_camera(camera)
    assert len(found) == 1


@pytest.mark.parametrize("config", [EfficientLVSMConfig(**SIZES), EfficientLVSMConfig(**PROPE, ray_frame="camera")])
def test_a_frame_from_a_kept_memory_casts_no_weight(cuda, config, monkeypatch):
    network = random_network(config).to(cuda)
    network.autocast_dtype = torch.bfloat16

    def casts_and_launches() -> tuple[int, int]:
        with torch.no_grad():
            memory = network.encode(make_views(1, 2, 16, 24).to(cuda))
            target = make_views(1, 1, 16, 24, seed=1).to(cuda)
            network.decode(memory, target)
            with launches() as found:
                network.decode(memory, target)
        return sum(name == "aten._to_copy" and isinstance(x, nn.Parameter) for name, x in found), len(found)

    casts, number = casts_and_launches()
    monkeypatch.setattr(RoundedCopy, "of", lambda self, module, *rest: module)
    per_layer = 6 + 3  # weights, and the gains of queries and keys
    assert casts_and_launches() == (2 + per_layer * config.num_layers, number + 2 + per_layer * config.num_layers)
    assert casts == 0


@pytest.mark.parametrize("config", [EfficientLVSMConfig(**PROPE), LVSMEncoderDecoderConfig(**SIZES, num_latents=5)])
def test_products_of_the_network_are_in_tf32_and_those_of_cameras_are_not(cuda, config, monkeypatch):
    found: dict[bool, set[str]] = {True: set(), False: set()}
    run = device_module._run

    def noted(func, args, kwargs):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            stack = [f"{frame.filename} {frame.name}" for frame in traceback.extract_stack()]
            places = "/geometry.py ", "camera_encoding.py of", "camera_encoding.py projection_matrices"
            found[any(place in line for line in stack for place in places)].add(torch.get_float32_matmul_precision())
        return run(func, args, kwargs)

    network, context, target = config.build().to(cuda), make_views(1, 3, 16, 24), make_views(1, 2, 16, 24, seed=1)
    context, target, before = context.to(cuda), target.to(cuda), torch.get_float32_matmul_precision()
    monkeypatch.setattr(device_module, "_run", noted)
    with torch.no_grad():
        memory = network.append(network.encode(context), target)
        network.decode(memory, target, nearest_views=2)
    network(context, target)
    assert found == {True: {"highest"}, False: {"high"}}
    assert torch.get_float32_matmul_precision() == before == "highest"


def test_an_iterations_gradients_are_in_tf32(cuda, collection, tmp_path, monkeypatch):
    config = tiny_config(tmp_path, collection)
    config.machine.device_type = "cuda"
    trainer = config.setup()
    trainer.setup()
    found, backward = [], torch.Tensor.backward
    noted = lambda loss: (found.append(torch.get_float32_matmul_precision()), backward(loss))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "backward", noted)
    trainer.train_iteration(0)
    assert found == ["high"] and torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def attention_kernels(monkeypatch):
    """Kernels in the order in which calls of attention were to try them; and afterwards PyTorch's choice again."""
    found: list[list[str]] = []

    @contextmanager
    def noted(order, set_priority):
        found.append([kernel.name for kernel in order] if set_priority else [])
        yield

    monkeypatch.setattr(kernels, "sdpa_kernel", noted)
    yield found
    kernels.use_attention("auto", torch.device("cuda"))


def rendered_with(attention: str, device: str) -> Tensor:
    torch.manual_seed(0)
    config = EfficientLVSMModelConfig(network=EfficientLVSMConfig(**SIZES), attention=attention, precision="fp32")
    model = config.setup(scene_box=None, num_train_data=1).to(device).eval()
    views = make_views(1, 2, 16, 24).to(device), make_views(1, 1, 16, 24, seed=1).to(device)
    with torch.no_grad():
        return model.network(*views).cpu()


def test_attention_is_by_the_kernel_that_is_asked_for(cuda, attention_kernels, monkeypatch):
    class Handle:
        def remove(self):
            removed.append(True)

    removed: list[bool] = []
    monkeypatch.setitem(torch.nn.attention._registry._FLASH_ATTENTION_IMPLS, "FA3", Handle)
    expected = rendered_with("auto", "cuda")
    assert not attention_kernels
    for name, first in (("cudnn", {"CUDNN_ATTENTION"}), ("fa3", {"FLASH_ATTENTION"}), ("auto", set())):
        attention_kernels.clear()
        assert torch.equal(rendered_with(name, "cuda"), expected)
        assert {order[0] for order in attention_kernels} == first, name
        assert (torch.nn.attention.current_flash_attention_impl() == "FA3") == (name == "fa3")
    assert removed == [True]


@pytest.mark.parametrize("name, package", [("fa3", "flash-attention"), ("fa4", "pip install flash-attn-4")])
def test_without_a_package_of_kernels_a_line_says_what_to_install(cuda, attention_kernels, capsys, name, package):
    expected = rendered_with("auto", "cuda")
    assert not capsys.readouterr().out
    assert torch.equal(rendered_with(name, "cpu"), rendered_with("auto", "cpu")) and not capsys.readouterr().out
    assert torch.equal(rendered_with(name, "cuda"), expected)
    said = "".join(capsys.readouterr().out.split())
    assert f"--pipeline.model.attention{name}:foundModuleNotFoundError" in said and package.replace(" ", "") in said
    assert not attention_kernels


class OnTheDevice(TorchDispatchMode):
    """Refuses operations whose results are not on the device: what a CUDA graph would not compute again. Numbers apart,
    which are constants where nothing waits."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        assert all(x.is_cuda for x in tree_leaves(results) if isinstance(x, Tensor) and x.ndim), function
        return results


@pytest.mark.parametrize("config", [EfficientLVSMConfig(**SIZES), EfficientLVSMConfig(**PROPE, ray_frame="camera")])
def test_a_frame_can_be_captured(cuda, config):
    """What a CUDA graph needs: no wait, the same operations whatever cameras and memory say, and all on the device, so
    that memory for results is the caching allocator's."""
    network = random_network(config).to(cuda)
    network.autocast_dtype = torch.bfloat16
    frames = []
    with torch.no_grad():
        for seed in (0, 1):
            memory = network.encode(make_views(1, 3, 16, 24, seed=seed).to(cuda))
            target = make_views(1, 1, 16, 24, seed=5 + seed).to(cuda)
            network.decode(memory, target)
            with launches() as launched, waits() as waiting, OnTheDevice():
                network.decode(memory, target)
            frames.append([(name, x.shape, x.dtype) for name, x in launched])
            assert not waiting
    assert frames[0] == frames[1]


def test_frames_are_captured_where_asked_for_on_the_device(cuda, monkeypatch):
    def model(device: str, **options: bool) -> EfficientLVSMModel:
        config = EfficientLVSMModelConfig(network=EfficientLVSMConfig(**SIZES), **options)
        return config.setup(scene_box=None, num_train_data=1).to(device).eval()

    assert model("cuda").network.captured_frames is model("cpu", cuda_graphs=True).network.captured_frames is None
    captured = model("cuda", cuda_graphs=True)
    graphs = captured.network.captured_frames
    assert WeightAverage(captured.network, 0.5).network.captured_frames is graphs
    captured.set_context(ViewSet(make_views(1, 2, 16, 24), make_views(1, 1, 16, 24, seed=1)))
    poses = torch.eye(4)[:3].repeat(5, 1, 1)
    poses[:, 0, 3] = torch.linspace(-0.5, 0.5, 5)
    replayed = []

    def capture(run):
        result = run()
        return lambda: (replayed.append(True), result.copy_(run())), result

    graphs._capture = capture
    memory, cameras = captured.memory(), [Cameras(pose, 30.0, 30.0, 16.0, 10.0, 33, 20) for pose in poses]
    with waits() as waiting:
        found = [captured.render(memory, camera)["rgb"] for camera in cameras]
    assert len(replayed) == 4 and not waiting
    captured.network.captured_frames = None
    for mine, camera in zip(found, cameras):
        assert mine.is_cuda and torch.equal(mine.cpu(), captured.render(memory, camera)["rgb"].cpu())


def test_without_a_driver_frames_are_not_captured_but_rendered(cuda):
    network = random_network(EfficientLVSMConfig(**SIZES)).to(cuda)
    network.captured_frames = CapturedFrames()
    with torch.no_grad():
        memory, target = network.encode(make_views(1, 2, 16, 24).to(cuda)), make_views(1, 1, 16, 24, seed=1).to(cuda)
        expected = network.decode(memory, target)
        with pytest.warns(UserWarning, match="rendered without CUDA graphs"):
            assert torch.equal(network.decode(memory, target).cpu(), expected.cpu())


def test_the_viewer_shows_pictures_and_attention(cuda, scene, tmp_path):
    session = Session(tiny_pipeline(scene, device="cuda"), tmp_path, default_composite_depth=True)
    try:
        for choice in ("manual", "nearest to camera"):
            session.set("Choice", choice)
            for output in ("rgb", "attention_view", "attention_evenness"):
                session.viewer.control_panel._output_render.value = output
                outputs = session.render()
                assert outputs[output].device == cuda and outputs[output].std() > 1e-3
                assert "could not be rendered" not in session.status.gui_handle.content
    finally:
        session.viewer.viser_server.stop()


# Splatting


@torch.no_grad()
def test_a_plane_sweep_stays_on_the_device(cuda):
    views = cameras(distortion=0.1)
    images = posed(cameras(), photos(cameras()))
    on_cuda = PosedImages(*(getattr(images, field.name).to(cuda) for field in fields(images)))
    for found, expected in zip(surface_points(on_cuda, num_planes=12), surface_points(images, num_planes=12)):
        assert found.is_cuda and abs(len(found) - len(expected)) < 0.01 * len(expected)
    picture, inside = undistort(views[:1].to(cuda), images.rgb[0].to(cuda))
    expected, _ = undistort(views[:1], images.rgb[0])
    assert inside.is_cuda and torch.allclose(picture.cpu(), expected, atol=1e-4)


def test_our_rasterizer_takes_gaussians_of_the_device(cuda):
    def image(device: str) -> list[Tensor]:
        inputs = {name: tensor.to(device, copy=True).requires_grad_() for name, tensor in gaussians(cameras=2).items()}
        rgb, alpha, info = rasterize(inputs)
        assert rgb.device.type == info["radii"].device.type == device
        (rgb.square().sum() + alpha.sum()).backward()
        return [x.detach().cpu() for x in (rgb, alpha, *(inputs[n].grad for n in ("means", "quats", "colors")))]

    torch.testing.assert_close(image("cuda"), image("cpu"), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", [splatfacto_sparse, splatfacto_lvsm])
def test_gaussians_are_fitted_on_the_device(cuda, tmp_path, method):
    config = deepcopy(method.config)
    config.pipeline.model.backend = "cpu"
    config.pipeline.datamanager = replace(
        config.pipeline.datamanager,
        data=write_scene(tmp_path / "scene", num_frames=12, size=(30, 36)),
        image_size=(24, 24),
        context_frames=(1, 5, 8),
        initial_points="random",
        num_initial_points=60,
        **({"rendered_share": 0.8, "num_rendered_views": 3} if method is splatfacto_lvsm else {}),
    )
    config = replace(config, output_dir=tmp_path, max_num_iterations=3, vis="tensorboard")
    config.machine.device_type = "cuda"
    trainer = config.setup()
    trainer.setup()
    trainer.train()
    pipeline = trainer.pipeline
    assert pipeline.model.means.device == cuda
    if method is splatfacto_lvsm:
        assert pipeline.datamanager.rendered.images.device == cuda and pipeline.prepared["rendered_views"]["steps"] > 0
    assert pipeline.get_average_eval_image_metrics(0, tmp_path / "pictures")["psnr"] > 0


# Scripts


def test_the_comparison_prepares_and_renders_on_the_device(cuda, scene, tmp_path):
    from elvsm_nerfstudio.compare.layout import MethodSpec, Settings
    from elvsm_nerfstudio.compare.methods import Baseline, Network, SceneContext
    from elvsm_nerfstudio.compare.path import path_through

    pipeline = tiny_pipeline(scene, device="cuda")
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, pipeline.model.network.state_dict(), pipeline.config.model.network)
    spec = MethodSpec("ours", "network", "efficient-lvsm-tiny", weights=str(weights), finetune_minutes=1e-4)
    shown = pipeline.datamanager.shown_scene(max_targets=1)
    index = tmp_path / "index.json"
    frames = {"context": list(shown.context_names), "target": list(shown.target_names)}
    index.write_text(json.dumps({"spheres": frames}))
    context = SceneContext("spheres", shown.views.context, index, shown.views.context.num_views)
    size = shown.views.context.height, shown.views.context.width
    settings = Settings(str(scene), size, "white", None, 1, ("spheres",))
    larger = replace(spec, image_size=(2 * size[0], 2 * size[1]))
    for method in (Baseline("copy-nearest"), Network(spec, settings, cuda), Network(larger, settings, cuda)):
        prepared = method.prepare(context)
        for path in (shown.cameras, path_through(context.views, 3).to(cuda)):
            pictures = [picture for picture, ms in prepared.render(path) if ms > 0]
            assert len(pictures) == len(path) and all(picture.device == cuda for picture in pictures)


@torch.no_grad()
def test_a_streams_views_are_read_onto_the_device(cuda, scene):
    from elvsm_nerfstudio.viewer.stream_views import replayed

    pipeline = tiny_pipeline(scene, device="cuda")
    datamanager, network = pipeline.datamanager, pipeline.model.network
    frames = datamanager.collection.load(datamanager.shown)
    first, second, target = replayed(frames, range(3), datamanager.config.images, cuda)
    memory = network.append(network.encode(first.as_context()), second.as_context())
    assert metrics.psnr(pipeline.model.render(memory, target.camera)["rgb"], target.rgb).is_cuda
