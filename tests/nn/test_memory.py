"""The memory: views come and go exactly, in shared storage that grows, in files, and the best placed are found."""

import copy
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_views
from test_network import SMALL, random_network

from elvsm_nerfstudio.geometry import CanonicalFrame, nearest_views, view_distance
from elvsm_nerfstudio.nn import device_memory
from elvsm_nerfstudio.nn.device_memory import NotEnoughMemoryError
from elvsm_nerfstudio.nn.lvsm import LVSMEncoderDecoderConfig
from elvsm_nerfstudio.nn.memory import MemoryFileError, SceneMemory, StoredView, load_memory
from elvsm_nerfstudio.nn.token_store import KeyValueStore
from elvsm_nerfstudio.views import Views

VIEW_BYTES = 4 * SMALL.num_layers * 2 * 4 * SMALL.width  # of a view of 16 x 16 pixels, 4 tokens, in fp32
TARGET = make_views(1, 2, 16, 16, seed=9)


@pytest.fixture
def network():
    """Without gradients, as for rendering; the tests of gradients make their own."""
    with torch.no_grad():
        yield random_network()


def addresses(memory: SceneMemory) -> list[int]:
    return [x.data_ptr() for layer in range(memory.num_layers) for x in memory.read(layer)]


def side_by_side(memories: list[SceneMemory]) -> SceneMemory:
    """What a memory has to equal: views encoded one by one, put together without any of its operations."""
    layers = [
        tuple(torch.cat(parts, dim=2) for parts in zip(*(memory.read(layer) for memory in memories)))
        for layer in range(SMALL.num_layers)
    ]
    views, start = [], 0
    for id, memory in enumerate(memories):
        views.append(StoredView(id, start, memory.num_tokens))
        start += memory.num_tokens
    first = memories[0]
    cameras = (torch.cat([getattr(m, name) for m in memories], dim=1) for name in ("camera_to_world", "intrinsics"))
    return SceneMemory(KeyValueStore.of(layers), tuple(views), *cameras, first.frame, first.weights)


def count_written(monkeypatch) -> list[int]:
    """Tokens written into storage from here on, a number for every write to a layer."""
    written: list[int] = []
    write = KeyValueStore.write

    def counting(self, start, layer, keys_values):
        written.append(keys_values[0].shape[2])
        write(self, start, layer, keys_values)

    monkeypatch.setattr(KeyValueStore, "write", counting)
    return written


def limit_memory(monkeypatch, available: int) -> None:
    monkeypatch.setattr(device_memory, "available_bytes", lambda device: available)


# Exactness


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_appends_drops_and_selects_equals_encoding_what_is_left(network, seed):
    scenes, choose = 1 + seed % 2, random.Random(seed)
    sizes = [(16, 16), (24, 16)]
    views = [make_views(scenes, 1, *choose.choice(sizes), seed=100 * seed + i) for i in range(12)]
    target = make_views(scenes, 2, 16, 16, seed=99)
    frame = CanonicalFrame.estimate(torch.cat([view.camera_to_world for view in views], dim=1))
    unused = list(range(12))
    alive = [unused.pop(0)]
    memory = network.encode(views[alive[0]], frame, ids=alive)
    kept = [(memory, list(alive))]
    for _ in range(14):
        step = choose.choice("aaadsfr")
        if step == "a" and unused:
            new = [unused.pop(0) for _ in range(min(len(unused), choose.choice([1, 1, 2])))]
            for i in new:
                memory = network.append(memory, views[i], ids=[i])
            alive = alive + new
        elif step == "d" and len(alive) > 1:
            gone = choose.sample(alive, choose.randrange(1, len(alive)))
            memory, alive = memory.drop(gone), [i for i in alive if i not in gone]
        elif step == "s":
            alive = choose.sample(alive, choose.randrange(1, len(alive) + 1))
            memory = memory.select(alive)
        elif step == "f":  # back to an earlier memory, so that two grow from the same one
            memory, alive = choose.choice(kept)
            unused = [i for i in range(12) if i not in alive]
        elif step == "r":
            memory = memory.reserve(choose.choice([1, 50]))
        kept.append((memory, list(alive)))
    for memory, alive in kept:
        plain = side_by_side([network.encode(views[i], frame) for i in alive])
        assert memory.ids == tuple(alive)
        assert memory.tokens_per_view == tuple(views[i].height * views[i].width // 64 for i in alive)
        assert memory.num_bytes == scenes * sum(memory.tokens_per_view) * VIEW_BYTES // 4
        assert torch.equal(memory.camera_to_world, plain.camera_to_world)
        assert torch.equal(memory.intrinsics, plain.intrinsics)
        assert torch.allclose(network.decode(memory, target), network.decode(plain, target), atol=1e-5)


def test_views_appended_one_by_one_equal_views_encoded_together(network):
    views = make_views(1, 5, 16, 16)
    frame = CanonicalFrame.estimate(views.camera_to_world)
    memory = network.encode(views.select([0]), frame)
    for view in range(1, 5):
        memory = network.append(memory, views.select([view]))
    assert memory.ids == (0, 1, 2, 3, 4) and memory.num_views == 5 and memory.num_bytes == 5 * VIEW_BYTES
    assert torch.allclose(network.decode(memory, TARGET), network(views, TARGET, frame), atol=1e-6)
    together = network.append(network.encode(views.select([0]), frame), views.select(slice(1, None)))
    assert torch.allclose(network.decode(together, TARGET), network(views, TARGET, frame), atol=1e-6)
    chosen = network.encode(views.select([3, 1]), frame)
    assert torch.allclose(network.decode(memory.select([3, 1]), TARGET), network.decode(chosen, TARGET), atol=1e-6)


def test_order_never_matters(network):
    views = make_views(1, 5, 16, 16)
    memory = network.encode(views)
    expected = network.decode(memory, TARGET)
    for order in ([4, 2, 0, 1, 3], [1, 0, 3, 2, 4]):
        assert torch.allclose(network.decode(memory.select(order), TARGET), expected, atol=1e-5)
        grown = network.encode(views.select(order[:1]), memory.frame)
        for view in order[1:]:
            grown = network.append(grown, views.select([view]))
        assert torch.allclose(network.decode(grown, TARGET), expected, atol=1e-5)


# Encoding


@pytest.mark.parametrize("chunk_tokens, most_views", [(1, 1), (4, 1), (23, 2), (8192, 7)])
def test_encoding_in_groups_equals_encoding_at_once(network, chunk_tokens, most_views):
    views, target = make_views(2, 7, 16, 16), make_views(2, 1, 16, 16, seed=1)
    with torch.enable_grad():
        at_once = network.encode(views)
    network.chunk_tokens = chunk_tokens
    batches = []
    network.context_blocks[0].register_forward_hook(lambda _, inputs, output: batches.append(len(output)))
    memory = network.encode(views)
    assert max(batches) == 2 * most_views and sum(batches) == 2 * 7
    assert torch.allclose(network.decode(memory, target), network.decode(at_once, target), atol=1e-6)
    network.append(memory, views)
    assert max(batches) == 2 * most_views and sum(batches) == 4 * 7


def test_many_views_are_appended_in_groups_into_room_made_once(network, monkeypatch):
    network.chunk_tokens = 8  # two views
    memory = network.encode(make_views(1, 1, 16, 16))
    written = count_written(monkeypatch)
    grown = network.append(memory, make_views(1, 6, 16, 16, seed=1))
    assert grown.store.capacity == 7 * 4 and max(written) == 8
    # The first view is copied once, the others are written behind it by the encoder.
    assert sum(written) == SMALL.num_layers * (4 + 6 * 4)


def test_inference_mode_makes_memories_that_work_outside_of_it(network):
    views = make_views(1, 4, 16, 16)
    with torch.inference_mode():
        memory = network.encode(views.select([0, 1]))
        memory = network.append(memory, views.select([2]))
        inside = network.decode(memory, TARGET)
    memory = network.append(memory, views.select([3]))  # into room allocated in inference mode
    assert torch.allclose(network.decode(memory, TARGET), network(views, TARGET, memory.frame), atol=1e-6)
    with torch.enable_grad():
        rendered = network.decode(memory.drop([3]), TARGET)
        rendered.sum().backward()
    assert torch.allclose(rendered, inside, atol=1e-6)
    assert network.target_blocks[0].cross_attention.to_q.weight.grad.abs().max() > 0
    assert network.context_tokenizer.weight.grad is None


@pytest.mark.parametrize("make", [SMALL.build, LVSMEncoderDecoderConfig(width=32, num_layers=1, head_dim=16).build])
def test_a_network_built_in_inference_mode_notices_that_its_weights_change(make):
    views = make_views(1, 2, 16, 16)
    with torch.inference_mode():
        network = make()
        memory = network.encode(views)
        network.decode(memory, TARGET)
        network.head.weight.mul_(2)
        with pytest.raises(ValueError, match="encoded by other weights"):
            network.decode(memory, TARGET)
    network(views, TARGET).sum().backward()
    assert network.head.weight.grad.abs().max() > 0


def test_gradients_flow_through_views_that_are_left():
    views = make_views(1, 4, 16, 16)
    frame = CanonicalFrame.estimate(views.camera_to_world)

    def gradient(make) -> torch.Tensor:
        network = random_network()
        network.decode(make(network), TARGET).square().mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])

    expected = gradient(lambda network: network.encode(views.select([0, 1, 2]), frame))
    assert expected[: random_network().context_tokenizer.weight.numel()].abs().max() > 0
    found = gradient(lambda network: network.encode(views.select([3, 0, 2, 1]), frame).drop([0]))
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_where_gradients_are_wanted_no_view_is_appended():
    network, views = random_network(), make_views(1, 3, 16, 16)
    with torch.no_grad():
        constant = network.encode(views.select([0, 1]))
    learned = network.encode(views.select([0, 1]))
    with pytest.raises(ValueError, match="append under torch.no_grad()"):
        network.append(constant, views.select([2]))
    network.requires_grad_(False)
    with pytest.raises(ValueError, match="append under torch.no_grad()"):
        network.append(learned, views.select([2]))
    assert network.append(constant, views.select([2])).num_views == 3


def test_a_memory_that_carries_gradients_is_never_written_to():
    network, views = random_network(), make_views(1, 3, 16, 16)
    memory = network.encode(views.select([0, 1]))
    before = network.decode(memory, TARGET)
    with torch.no_grad():
        grown = network.append(network.append(memory, views.select([2])), views.select([0]))
    assert not grown.store.carries_gradients and memory.store.carries_gradients and memory.store.room() == 0
    before.sum().backward()


def test_appending_does_not_disturb_gradients_through_what_is_there():
    network, views = random_network(), make_views(1, 4, 16, 16)
    with torch.no_grad():
        memory = network.append(network.encode(views.select([0, 1])), views.select([2]))
    assert memory.store.room() == 4
    rendered = network.decode(memory, TARGET)
    with torch.no_grad():
        assert network.append(memory, views.select([3])).store is memory.store
    rendered.sum().backward()
    expected = network.target_tokenizer.weight.grad.clone()
    network.zero_grad()
    with torch.no_grad():
        again = network.encode(views.select([0, 1, 2]), memory.frame)
    network.decode(again, TARGET).sum().backward()
    assert torch.allclose(network.target_tokenizer.weight.grad, expected, atol=1e-5 * float(expected.abs().max()))


# Storage


def test_selections_share_storage_and_runs_are_read_in_place(network):
    memory = network.encode(make_views(1, 6, 16, 16))
    token = 4 * SMALL.width  # bytes
    assert addresses(memory.select([2, 3])) == [address + 2 * 4 * token for address in addresses(memory)]
    assert addresses(memory.select([1, 2, 0])) == addresses(memory.drop([3, 4, 5])) == addresses(memory)
    scattered = memory.drop([2])
    assert scattered.store is memory.store and scattered.runs == [(0, 8), (12, 12)]
    copied = scattered.reserve(7)
    assert copied.runs == [(0, 20)] and copied.store.capacity == 40 and copied.ids == scattered.ids
    for layer in range(SMALL.num_layers):
        for gathered, moved in zip(scattered.read(layer), copied.read(layer)):
            assert torch.equal(gathered, moved)


def test_memories_that_grow_from_the_same_one_do_not_see_each_other(network):
    views = make_views(1, 6, 16, 16)
    first = network.encode(views.select([0]), CanonicalFrame.estimate(views.camera_to_world))
    ancestor = network.append(first, views.select([1])).reserve(16)
    forks = [network.append(ancestor, views.select([i])) for i in (2, 3, 4, 5)]
    assert all(fork.store is ancestor.store for fork in forks) and ancestor.store.room() == 0
    forks.append(network.append(ancestor, views.select([5])))
    assert forks[-1].store is not ancestor.store
    for memory, left in zip([first, ancestor, *forks], ([0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5])):
        expected = network.encode(views.select(left), first.frame)
        assert torch.allclose(network.decode(memory, TARGET), network.decode(expected, TARGET), atol=1e-5)


def test_appending_n_views_copies_in_proportion_to_n(network, monkeypatch):
    views = make_views(1, 1, 8, 8)  # one token
    memory = network.encode(views)
    written, stores = count_written(monkeypatch), {id(memory.store)}
    for _ in range(99):
        memory = network.append(memory, views)
        stores.add(id(memory.store))
    assert memory.num_views == 100 and sum(written) <= 3 * 100 * SMALL.num_layers
    assert len(stores) <= 2 + math.log2(100)


def test_a_sliding_window_stays_in_one_piece_and_does_not_grow(network, monkeypatch):
    views = make_views(1, 4, 8, 8)
    memory = network.encode(views)
    written = count_written(monkeypatch)
    for _ in range(60):
        memory = network.append(memory, views.select([0])).drop(memory.ids[:1])
        assert len(memory.runs) == 1 and memory.num_views == 4 and memory.store.capacity <= 8
    assert memory.ids == (60, 61, 62, 63) and sum(written) <= 3 * 60 * SMALL.num_layers


def test_tokens_are_kept_in_the_networks_precision_and_cameras_in_fp32(network):
    network.autocast_dtype = torch.bfloat16
    memory = network.encode(make_views(1, 4, 16, 16))
    assert memory.dtype == torch.bfloat16 and memory.num_bytes == 4 * VIEW_BYTES / 2
    assert memory.camera_to_world.dtype == memory.frame.axes.dtype == torch.float32


def test_cameras_are_the_memorys_own(network):
    views = make_views(1, 2, 16, 16)
    memory = network.encode(views)
    pose, intrinsics = views.camera_to_world.clone(), views.intrinsics.clone()
    views.camera_to_world.zero_()
    assert torch.equal(memory.camera_to_world, pose) and torch.equal(memory.intrinsics, intrinsics)


# Bad input


def test_unknown_repeated_and_taken_ids_are_refused(network):
    views = make_views(1, 3, 16, 16)
    memory = network.encode(views)
    with pytest.raises(ValueError, match=r"drop: no views \[3, 7\]; the memory has \[0, 1, 2\]"):
        memory.drop([7, 1, 3])
    with pytest.raises(ValueError, match="drop: no view would be left"):
        memory.drop([0, 1, 2])
    with pytest.raises(ValueError, match=r"select: found views \[0, 3\]; expected at least one of \[0, 1, 2\]"):
        memory.select([0, 3])
    with pytest.raises(ValueError, match=r"select: found views \[\]"):
        memory.select([])
    with pytest.raises(ValueError, match=r"found view ids \[1, 1\]"):
        memory.select([1, 1])
    with pytest.raises(ValueError, match=r"cannot add views \[3, 2, 4\]; it already has \[2\]"):
        network.append(memory, views, ids=[3, 2, 4])
    with pytest.raises(ValueError, match=r"found view ids \[4\]; expected 3 different ones"):
        network.append(memory, views, ids=[4])
    more = network.append(memory.drop([2]), views)
    assert more.ids == (0, 1, 3, 4, 5)  # a dropped id is not given again
    back = network.append(more, views.select([2]), ids=[2])
    assert network.append(back, views.select([0])).ids == (0, 1, 3, 4, 5, 2, 6)


def test_memories_of_other_weights_and_batches_are_refused(network):
    views = make_views(1, 3, 16, 16)
    memory = network.encode(views.select([0, 1]))
    both = make_views(2, 3, 16, 16)
    with pytest.raises(ValueError, match="the memory is of 1 scenes, the views are of 2"):
        network.append(memory, both)
    with pytest.raises(ValueError, match="the memory is of 1 scenes, the views are of 2"):
        network.decode(memory, both)
    for other in (random_network(), copy.deepcopy(network)):  # equal weights, but they need not stay so
        with pytest.raises(ValueError, match="encoded by other weights"):
            other.append(memory, views.select([2]))
        with pytest.raises(ValueError, match="encoded by other weights"):
            other.decode(memory, TARGET)


@pytest.mark.parametrize("change", ["step", "load", "assign", "replace", "precision"])
def test_a_memory_is_refused_once_the_weights_have_changed(network, change):
    views = make_views(1, 3, 16, 16)
    memory = network.encode(views)
    network.decode(memory, TARGET)
    if change == "step":
        network.head.weight.grad = torch.ones_like(network.head.weight)
        torch.optim.AdamW(network.parameters(), lr=1e-3).step()
    elif change == "replace":
        network.head.weight = torch.nn.Parameter(network.head.weight * 2)
    elif change == "precision":
        network.to(torch.bfloat16)
    else:
        network.load_state_dict(random_network(seed=1).state_dict(), assign=change == "assign")
    with pytest.raises(ValueError, match="encoded by other weights"):
        network.decode(memory, TARGET)
    with pytest.raises(ValueError, match="encoded by other weights"):
        network.append(memory, views)


def test_no_views_are_an_error_before_any_computation(network, monkeypatch):
    views = make_views(1, 3, 16, 16)
    memory = network.encode(views)
    monkeypatch.setattr(type(network), "_encode", None)
    for call in (network.encode, lambda empty: network.append(memory, empty)):
        with pytest.raises(ValueError, match="at least one view; found 0 views"):
            call(views.select([]))


def test_more_views_than_memory_allows_are_refused_before_any_computation(network, monkeypatch):
    views = make_views(1, 5, 16, 16)
    memory = network.encode(views)
    grown = network.append(memory, views.select([0]))
    assert grown.store.room() == 16
    limit_memory(monkeypatch, 5 * VIEW_BYTES)
    network.encode(views)
    limit_memory(monkeypatch, 5 * VIEW_BYTES - 1)
    network.append(grown, views.select([1]))  # room that is there already costs nothing
    monkeypatch.setattr(type(network), "_encode", None)
    needed = rf"\({5 * VIEW_BYTES} bytes\) needed on cpu, .*\({5 * VIEW_BYTES - 1} bytes\) available"
    with pytest.raises(NotEnoughMemoryError, match=needed):
        network.encode(views)
    with pytest.raises(NotEnoughMemoryError, match=rf"\({6 * VIEW_BYTES} bytes\) needed on cpu"):
        network.append(memory, views.select([1]))


def test_a_memory_grows_by_just_enough_where_twice_as_much_would_not_fit(network, monkeypatch):
    views = make_views(1, 5, 16, 16)
    memory = network.encode(views)
    limit_memory(monkeypatch, 6 * VIEW_BYTES)
    assert network.append(memory, views.select([1])).store.capacity == 6 * 4


def test_available_memory_is_what_the_system_says():
    available = device_memory.available_bytes(torch.device("cpu"))
    if sys.platform == "linux":
        kilobytes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())["MemAvailable"]
        assert available == pytest.approx(1024 * int(kilobytes.split()[0]), rel=0.5)  # others take and free some
    assert device_memory.available_bytes(torch.device("meta")) is None


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_memory_comes_back_from_a_file(network, tmp_path, dtype):
    network.autocast_dtype = None if dtype == torch.float32 else dtype
    views, target = make_views(2, 4, 16, 16), make_views(2, 1, 16, 16, seed=1)
    memory = network.append(network.encode(views), make_views(2, 1, 24, 16, seed=2), ids=[11])
    memory = memory.select([11, 3, 0, 2])
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_size < memory.num_bytes + 20_000
    again = random_network()  # another instance with the same weights, as in another process
    again.autocast_dtype = network.autocast_dtype
    loaded = load_memory(path, again)
    path.write_bytes(b"")  # what is loaded does not depend on the file
    assert (loaded.ids, loaded.tokens_per_view, loaded.next_id) == (memory.ids, memory.tokens_per_view, 12)
    assert loaded.dtype == dtype and loaded.num_bytes == memory.num_bytes
    assert torch.equal(loaded.camera_to_world, memory.camera_to_world)
    assert torch.equal(loaded.intrinsics, memory.intrinsics)
    assert torch.equal(again.decode(loaded, target), network.decode(memory, target))
    grown = again.append(loaded.drop([3]), views.select([1]))
    assert grown.ids == (11, 0, 2, 12)
    assert torch.equal(again.decode(grown.select([11, 0, 2]), target), network.decode(memory.drop([3]), target))


def test_files_of_other_networks_are_refused(network, tmp_path):
    path = tmp_path / "memory.safetensors"
    memory = network.encode(make_views(1, 2, 16, 16))
    memory.save(path)
    with pytest.raises(MemoryFileError, match="memory.safetensors: encoded by other weights .fingerprint"):
        load_memory(path, random_network(seed=1))
    for change in (dict(num_layers=2), dict(width=128), dict(head_dim=32)):
        with pytest.raises(MemoryFileError, match="another architecture, .*width 64, 3 layers.*; this network is"):
            load_memory(path, random_network(replace(SMALL, **change)))
    network.head.weight.mul_(2)
    with pytest.raises(ValueError, match="the network's weights are no longer those that encoded the memory"):
        memory.save(path)


def test_a_file_is_read_in_the_networks_precision(network, tmp_path):
    network.autocast_dtype = torch.bfloat16
    memory = network.encode(make_views(1, 2, 16, 16))
    memory.save(tmp_path / "memory.safetensors")
    rounded = network.decode(memory, TARGET)
    network.autocast_dtype = None  # as on a device without bf16
    loaded = load_memory(tmp_path / "memory.safetensors", network)
    assert loaded.dtype == torch.float32 and torch.equal(loaded.read(1)[0], memory.read(1)[0].float())
    assert torch.allclose(network.decode(loaded, TARGET), rounded, atol=0.05)


def test_views_that_do_not_fit_a_files_tensors_are_refused(network, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "memory.safetensors"
    network.encode(make_views(1, 2, 16, 16)).save(path)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), load_file(path)
    for views in ([[0, 0, 4]], [[0, 0, 4], [1, 8, 4]], [[0, 0, 4], [1, 4, 4], [2, 8, 4]], [[0, 0], [1, 4]]):
        save_file(tensors, path, {**metadata, "views": str(views)})
        with pytest.raises(MemoryFileError, match="memory.safetensors is not a scene memory, or is damaged"):
            load_memory(path, network)


def test_damaged_files_and_other_files_are_refused(network, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "memory.safetensors"
    network.encode(make_views(1, 2, 16, 16)).save(path)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:20], b"", b"not a memory" * 9):
        path.write_bytes(content)
        with pytest.raises(MemoryFileError, match="memory.safetensors is not a scene memory, or is damaged"):
            load_memory(path, network)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(MemoryFileError, match="found format None"):
        load_memory(path, network)
    with pytest.raises(FileNotFoundError):
        load_memory(tmp_path / "nowhere.safetensors", network)


def test_others_may_read_a_file_where_they_may_read_any(network, tmp_path):
    path, any_file = tmp_path / "memory.safetensors", tmp_path / "any"
    any_file.touch()
    network.encode(make_views(1, 2, 16, 16)).save(path)
    assert path.stat().st_mode == any_file.stat().st_mode


def test_an_interrupted_save_leaves_the_old_file(network, tmp_path, monkeypatch):
    path = tmp_path / "memory.safetensors"
    memory = network.encode(make_views(1, 2, 16, 16))
    memory.drop([0]).save(path)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        memory.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = load_memory(path, network)
    assert loaded.ids == (1,)
    assert torch.equal(network.decode(loaded, TARGET), network.decode(memory.drop([0]), TARGET))


def test_a_folder_that_is_a_file_is_an_error(network, tmp_path):
    (tmp_path / "folder").touch()
    with pytest.raises(OSError, match="folder/memory.safetensors cannot be written: "):
        network.encode(make_views(1, 1, 16, 16)).save(tmp_path / "folder" / "memory.safetensors")


def test_a_file_larger_than_memory_is_refused(network, tmp_path, monkeypatch):
    path = tmp_path / "memory.safetensors"
    network.encode(make_views(1, 2, 16, 16)).save(path)
    limit_memory(monkeypatch, 100)
    with pytest.raises(NotEnoughMemoryError, match=rf"\({2 * VIEW_BYTES} bytes\) needed on cpu"):
        load_memory(path, network)


# The nearest views


def place(centres: list[tuple[float, float, float]], yaw_degrees: list[float]) -> torch.Tensor:
    """OpenCV poses [1, view, 4, 4]: looking along +Z, turned about +Y."""
    poses = torch.eye(4).repeat(1, len(centres), 1, 1)
    for view, (centre, degrees) in enumerate(zip(centres, yaw_degrees)):
        angle = math.radians(degrees)
        poses[0, view, :3, 2] = torch.tensor([math.sin(angle), 0.0, math.cos(angle)])
        poses[0, view, :3, 0] = torch.tensor([math.cos(angle), 0.0, -math.sin(angle)])
        poses[0, view, :3, 3] = torch.tensor(centre)
    return poses


def test_view_distance_is_place_in_units_of_the_extent_plus_direction():
    context = place([(-2, 0, 0), (2, 0, 0), (0, 0, 1), (0, 0, -1)], [0, 90, 180, 0])
    distance = view_distance(context, place([(2, 0, 0)], [0]))
    assert torch.allclose(distance[0, 0], torch.tensor([2.0, 1.0, 5**0.5 / 2 + 2, 5**0.5 / 2]), atol=1e-6)
    scaled = context.clone()
    scaled[..., :3, 3] *= 50
    assert torch.allclose(view_distance(scaled, place([(100, 0, 0)], [0])), distance, atol=1e-5)
    assert nearest_views(context, place([(2, 0, 0)], [0]), 3).tolist() == [[[1, 3, 0]]]
    with pytest.raises(ValueError, match="count is 5; expected 1 to 4"):
        nearest_views(context, context, 5)


def test_all_nearest_views_are_the_whole_memory_and_one_is_that_views_memory(network):
    views, target = make_views(2, 5, 16, 16), make_views(2, 4, 16, 16, seed=3)
    memory = network.encode(views)
    for count in (5, 9):
        assert torch.equal(network.decode(memory, target, nearest_views=count), network.decode(memory, target))
    for count in (1, 3):
        rendered = network.decode(memory, target, nearest_views=count)
        chosen = nearest_views(memory.camera_to_world, target.camera_to_world, count)
        for scene in range(2):
            for view in range(4):
                alone = network.encode(part(views, scene, chosen[scene, view].tolist()), memory.scene(scene).frame)
                expected = network.decode(alone, part(target, scene, [view]))
                assert torch.allclose(rendered[scene, view], expected[0, 0], atol=1e-5)
    with pytest.raises(ValueError, match="count is 0"):
        network.decode(memory, target, nearest_views=0)


def part(views: Views, scene: int, index: list[int]) -> Views:
    return Views(
        *(x[scene : scene + 1, index] for x in (views.camera_to_world, views.directions, views.intrinsics, views.rgb))
    )


def test_nearest_views_of_several_sizes_and_in_any_order(network):
    small, large = make_views(1, 3, 16, 16), make_views(1, 3, 24, 16, seed=1)
    memory = network.append(network.encode(small, ids=[4, 0, 2]), large, ids=[1, 5, 3])
    rendered = network.decode(memory, TARGET, nearest_views=2)
    assert torch.equal(network.decode(memory, TARGET, nearest_views=2), rendered)
    chosen = nearest_views(memory.camera_to_world, TARGET.camera_to_world, 2)[0].tolist()
    assert memory.nearest(TARGET.camera_to_world, 2) == [[tuple(sorted(memory.ids[i] for i in c)) for c in chosen]]
    shuffled = memory.select([5, 0, 3, 1, 4, 2])
    assert torch.allclose(network.decode(shuffled, TARGET, nearest_views=2), rendered, atol=1e-5)
    assert (rendered - network.decode(memory, TARGET)).abs().max() > 1e-3


def test_of_equally_near_views_the_lower_ids_are_taken(network):
    views = make_views(1, 4, 16, 16)
    same = replace(views, camera_to_world=views.camera_to_world[:, :1].expand(1, 4, 4, 4))
    memory = network.encode(same, ids=[8, 2, 6, 4])
    assert memory.nearest(TARGET.camera_to_world, 2) == [[(2, 4), (2, 4)]]
    assert memory.select([6, 4, 8, 2]).nearest(TARGET.camera_to_world, 3) == [[(2, 4, 6), (2, 4, 6)]]
