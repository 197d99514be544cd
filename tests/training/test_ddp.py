"""Several devices: the same training as with one that sees all their scenes. Two processes on the CPU, over gloo."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tiny_training import gradients, no_writers_are_left, tiny_trainer  # noqa: F401

from elvsm_nerfstudio.data.samples import mix_seed
from elvsm_nerfstudio.training.checkpoints import read_checkpoint
from elvsm_nerfstudio.training.prefixes import Prefixes
from elvsm_nerfstudio.views import Views, ViewSet


@pytest.fixture(scope="module")
def folder(tmp_path_factory, collection) -> Path:
    """What two ranks of two scenes each left behind."""
    folder = tmp_path_factory.mktemp("ddp")
    launcher = Path(__file__).parents[1] / "ddp_launcher.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(launcher), str(folder), str(collection)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, collection) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Target images, gradients and loss of one process that sees four scenes."""
    trainer = tiny_trainer(tmp_path_factory.mktemp("alone"), collection, scenes_per_batch=4)
    images = trainer.pipeline.datamanager.next_train(0)[1]["image"]
    loss, _, _ = trainer.train_iteration(0)
    return images, gradients(trainer), loss


def test_ranks_draw_different_scenes_and_together_those_of_one_process(ranks, alone):
    assert torch.equal(torch.cat([rank["images"] for rank in ranks]), alone[0])
    assert not torch.equal(ranks[0]["images"], ranks[1]["images"])


@pytest.mark.parametrize("which, tolerance", [("gradients", 1e-5), ("accumulated", 1e-5), ("compressed", 1e-3)])
def test_gradients_are_those_of_one_process_with_all_scenes(ranks, alone, which, tolerance):
    for name, expected in alone[1].items():
        for rank in ranks:
            assert (rank[which][name] - expected).abs().max() < tolerance, name
    assert max(gradient.abs().max() for gradient in alone[1].values()) > 1e-3


def test_losses_are_logged_as_the_mean_of_the_ranks(ranks, alone):
    for rank in ranks:
        assert torch.stack(rank["losses"]) == pytest.approx(alone[2].expand(2), rel=1e-5)


def test_gradients_are_exchanged_once_for_each_step(ranks):
    one, other = (rank["unsynchronised"] for rank in ranks)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_compressed_gradients_are_exchanged_in_bf16(ranks):
    for name, gradient in ranks[0]["compressed"].items():
        assert torch.equal(gradient, gradient.bfloat16().float()), name
    assert any(not torch.equal(x, ranks[0]["gradients"][name]) for name, x in ranks[0]["compressed"].items())


def test_ranks_share_out_muons_matrices(ranks, tmp_path, collection):
    trainer = tiny_trainer(tmp_path, collection, scenes_per_batch=2, muon=True)
    before = deepcopy(trainer.pipeline.model.network.state_dict())
    trainer.train_iteration(0)
    for name, expected in trainer.pipeline.model.network.state_dict().items():
        assert torch.equal(ranks[0]["muon"][name], ranks[1]["muon"][name]), name
        # Directions of almost no gradient are made as long as all others, whatever rounding left of them.
        assert (ranks[0]["muon"][name] - expected).norm() <= 0.2 * (expected - before[name]).norm(), name


def test_a_bad_batch_on_one_rank_skips_the_step_on_all(ranks):
    for rank in ranks:
        assert rank["counts"] == {"skipped_steps": 1, "nonfinite_steps": 1, "skips_in_a_row": 1}
        for name, weights in rank["muon"].items():
            assert torch.equal(rank["after a bad batch"][name], weights), name


def test_evaluation_is_shared_out_and_equals_that_of_one_process(ranks, folder, tmp_path, collection):
    saved = folder / "plain" / "rank0" / "a" / "efficient-lvsm-tiny" / "run" / "nerfstudio_models"
    trainer = tiny_trainer(tmp_path, collection, load_dir=saved, ema_decay=0.9, max_num_iterations=3)
    trainer.pipeline.datamanager.eval_entries = trainer.pipeline.datamanager.train_entries[:3]
    expected = trainer.pipeline.get_average_eval_image_metrics()
    for rank in ranks:
        assert rank["scores"] == expected


def test_gradients_of_prefixes_are_the_mean_of_the_ranks_which_draw_their_own(ranks, tmp_path, collection):
    trainer = tiny_trainer(tmp_path, collection, scenes_per_batch=2, prefix_loss=True)
    datamanager, model = trainer.pipeline.datamanager, trainer.pipeline.model.train()
    views, batch = datamanager.next_train(0)
    drawn = []
    for rank in range(2):
        of_rank = slice(rank, rank + 1)
        generator = torch.Generator().manual_seed(mix_seed(datamanager.config.seed, 4, rank))
        model.generator = generator.clone_state()
        drawn.append(Prefixes.draw(2, 2, generator))
        outputs = model(ViewSet(*(scenes_of(part, of_rank) for part in (views.context, views.target))))
        sum(model.get_loss_dict(outputs, {"image": batch["image"][of_rank]}).values()).backward()
    assert drawn[0] != drawn[1]
    for name, total in gradients(trainer).items():
        for rank in ranks:
            assert (rank["prefixed"][name] - total / 2).abs().max() < 1e-5, name


def scenes_of(views: Views, scenes: slice) -> Views:
    parts = (views.camera_to_world, views.directions, views.intrinsics, views.rgb)
    return Views(*(part[scenes] for part in parts))


def test_rank_0_alone_writes(folder, ranks):
    assert not [path for path in (folder / "plain" / "rank1").rglob("*") if path.is_file()]
    run = folder / "plain" / "rank0" / "a" / "efficient-lvsm-tiny" / "run"
    assert (run / "dataparser_transforms.json").exists() and list(run.glob("events.*"))
    state = read_checkpoint(run / "nerfstudio_models" / "step-000000001.ckpt")
    assert not any("module." in name for name in state["pipeline"])
    for name, tensor in ranks[0]["average"].items():
        assert torch.equal(tensor, ranks[1]["average"][name]), name
        assert torch.equal(tensor, state["pipeline"][f"_model.network.{name}"])


def test_what_several_devices_saved_goes_on_on_one(folder, tmp_path, collection):
    saved = folder / "plain" / "rank0" / "a" / "efficient-lvsm-tiny" / "run" / "nerfstudio_models"
    trainer = tiny_trainer(tmp_path, collection, load_dir=saved, ema_decay=0.9, max_num_iterations=3)
    trainer.train_iteration(trainer._start_step)
    # One iteration by hand, two of the training loop.
    assert trainer._start_step == 2 and trainer.average.updates == 4
