"""Which views the samplers choose, and how often."""

import math
from collections import Counter

import pytest
import torch
from conftest import look_at, random_poses

from elvsm_nerfstudio.data.view_geometry import azimuth_order, farthest_point_views
from elvsm_nerfstudio.data.view_samplers import (
    AngularGroupSampler,
    BoundedGapSampler,
    FarthestPointSampler,
    NearestViewSampler,
    RandomViewSampler,
    draw_num_context_views,
)
from elvsm_nerfstudio.geometry import nearest_others, nearest_views

DRAWING = [RandomViewSampler, BoundedGapSampler, AngularGroupSampler, FarthestPointSampler, NearestViewSampler]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def poses_around(count: int, seed: int = 0) -> torch.Tensor:
    return random_poses(count, seeded(seed))[:, :3]


def orbit(azimuths: torch.Tensor) -> torch.Tensor:
    """Poses on a circle above the origin, looking at it."""
    return torch.stack([look_at(torch.stack([a.cos(), a.sin(), torch.tensor(0.5)])) for a in azimuths])[:, :3]


def transformed(poses: torch.Tensor, seed: int) -> torch.Tensor:
    """The poses in a world that is turned, scaled and moved at random."""
    generator = seeded(seed)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    rotation = rotation * rotation.det()
    turned = rotation @ poses
    turned[:, :, 3] = 4.2 * turned[:, :, 3] + torch.randn(3, generator=generator)
    return turned


def assert_uniform(counts: Counter, values: range) -> None:
    """Pearson's chi-square, which a uniform draw exceeds in less than about 1 of 1,000 trials."""
    assert set(counts) <= set(values)
    expected, freedom = counts.total() / len(values), len(values) - 1
    chi_square = sum((counts[value] - expected) ** 2 / expected for value in values)
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4


def small(sampler_class, num_target_views: int, targets_include_context: bool = False):
    """A sampler that has views to choose from in a scene of a dozen frames."""
    bounds = dict(min_gap=4, max_gap=9) if sampler_class is BoundedGapSampler else {}
    return sampler_class(num_target_views, targets_include_context, **bounds)


# All samplers


@pytest.mark.parametrize("num_context_views", [1, 2, 5])
@pytest.mark.parametrize("sampler_class", DRAWING)
def test_choices_are_distinct_frames_of_the_scene_and_disjoint(sampler_class, num_context_views):
    frames, poses, generator = range(30, 60, 2), poses_around(15), seeded()
    sampler = small(sampler_class, 3)
    for _ in range(50):
        choice = sampler(frames, poses, num_context_views, generator, 0)
        assert len(choice.context) == num_context_views and len(choice.target) == 3
        assert len({*choice.context, *choice.target}) == num_context_views + 3
        assert {*choice.context, *choice.target} <= set(frames)


@pytest.mark.parametrize("sampler_class", DRAWING)
def test_targets_may_be_drawn_among_context_too(sampler_class):
    sampler, generator = small(sampler_class, 3, targets_include_context=True), seeded()
    overlap = Counter()
    for _ in range(600):
        choice = sampler(range(12), poses_around(12), 2, generator, 0)
        assert len(set(choice.context)) == 2 and len(set(choice.target)) == 3
        assert len({*choice.context, *choice.target}) <= 5
        overlap[len(set(choice.context) & set(choice.target))] += 1
    # 3 of the 5 drawn frames, or, of nearest views, 2 of the 4 beside the anchor.
    ways = [1, 4, 1] if sampler_class is NearestViewSampler else [1, 6, 3]
    for both, expected in enumerate(ways):
        assert overlap[both] / 600 == pytest.approx(expected / sum(ways), abs=0.08)


@pytest.mark.parametrize("sampler_class", DRAWING)
def test_a_choice_depends_on_the_generator_alone(sampler_class):
    sampler, poses = small(sampler_class, 3), poses_around(12)
    torch.manual_seed(1)
    first = [sampler(range(12), poses, 2, seeded(seed), 0) for seed in range(20)]
    torch.manual_seed(2)
    assert [sampler(range(12), poses, 2, seeded(seed), 0) for seed in range(20)] == first
    assert len(set(first)) > 10


@pytest.mark.parametrize("sampler_class", DRAWING)
def test_too_few_frames_are_refused(sampler_class):
    sampler = small(sampler_class, 4)
    with pytest.raises(ValueError, match="^6 frames; expected at least 7, for 3 context and 4 target views$"):
        sampler(range(6), poses_around(6), 3, seeded(), 0)
    assert len(sampler(range(7), poses_around(7), 3, seeded(), 0).target) == 4


# Random


def test_random_context_and_targets_are_any_frames():
    sampler, generator = RandomViewSampler(2, targets_include_context=False), seeded()
    choices = [sampler(range(6), poses_around(6), 2, generator, 0) for _ in range(1500)]
    pairs = [(a, b) for a in range(6) for b in range(6) if a != b]
    for chosen in ("context", "target"):
        assert_uniform(Counter(pairs.index(getattr(choice, chosen)) for choice in choices), range(30))


# Bounded gap


def stretches(sampler: BoundedGapSampler, num_frames: int, count: int, num_context_views: int = 2, step: int = 0):
    """First and last context frame of many draws."""
    generator = seeded()
    for _ in range(count):
        choice = sampler(range(num_frames), torch.zeros(num_frames, 3, 4), num_context_views, generator, step)
        assert choice.context == tuple(sorted(choice.context))
        assert all(choice.context[0] < target < choice.context[-1] for target in choice.target)
        yield choice.context[0], choice.context[-1]


def test_gaps_and_starts_are_uniform():
    drawn = list(stretches(BoundedGapSampler(6, False, min_gap=10, max_gap=29), 32, 4000))
    assert_uniform(Counter(last - first for first, last in drawn), range(10, 30))
    for gap in (10, 20, 29):
        assert_uniform(Counter(first for first, last in drawn if last - first == gap), range(32 - gap))


def test_targets_and_further_context_are_uniform_inside():
    sampler, generator = BoundedGapSampler(2, False, min_gap=10, max_gap=10), seeded()
    inside = {"context": Counter(), "target": Counter()}
    for _ in range(2000):
        choice = sampler(range(11), torch.zeros(11, 3, 4), 4, generator, 0)
        assert choice.context[0] == 0 and choice.context[-1] == 10
        inside["context"].update(choice.context[1:-1])
        inside["target"].update(choice.target)
    assert_uniform(inside["context"], range(1, 10))
    assert_uniform(inside["target"], range(1, 10))


def test_a_single_context_view_is_at_either_end():
    sampler, generator = BoundedGapSampler(3, False, min_gap=8, max_gap=8), seeded()
    firsts, targets = Counter(), Counter()
    for _ in range(1000):
        choice = sampler(range(9), torch.zeros(9, 3, 4), 1, generator, 0)
        firsts[choice.context[0] // 8] += 1
        targets.update(choice.target)
    assert_uniform(firsts, range(2))
    assert set(targets) == set(range(9))


@pytest.mark.parametrize("step, largest", [(0, 30), (50, 111), (99, 190), (100, 192), (10**6, 192)])
def test_the_gap_grows_in_the_warm_up(step, largest):
    sampler = BoundedGapSampler(6, False, initial_max_gap=30, warmup_steps=100)
    assert sampler.max_gap_at(step) == largest
    gaps = [last - first for first, last in stretches(sampler, 300, 1000, step=step)]
    assert 25 <= min(gaps) <= 26 and largest - 2 <= max(gaps) <= largest


def test_the_gap_starts_at_its_smallest_by_default():
    assert BoundedGapSampler(6, False, warmup_steps=10).max_gap_at(0) == 25
    assert BoundedGapSampler(6, False).max_gap_at(0) == 192


def test_the_gap_fits_the_scene_and_the_views():
    sampler = BoundedGapSampler(6, False)
    assert {last - first for first, last in stretches(sampler, 28, 200)} == {25, 26, 27}
    assert set(stretches(sampler, 26, 20)) == {(0, 25)}
    # 27 + 6 frames need a gap of 32, whatever the bounds.
    tight = BoundedGapSampler(6, False, min_gap=10, max_gap=20)
    assert {last - first for first, last in stretches(tight, 40, 50, num_context_views=27)} == {32}


def test_the_gap_counts_the_frames_that_may_be_used():
    frames = [0, 1, 2, 3, 50, 51, 52, 90, 91, 92]
    choice = BoundedGapSampler(2, False, min_gap=9, max_gap=9)(frames, torch.zeros(10, 3, 4), 2, seeded(), 0)
    assert choice.context == (0, 92) and set(choice.target) <= set(frames[1:-1])


def test_scenes_shorter_than_the_gap_and_bad_gaps_are_refused():
    message = r"^25 frames; expected at least 26, the smallest frame gap plus one \(--pipeline.datamanager.frame-gap\)"
    with pytest.raises(ValueError, match=message):
        BoundedGapSampler(6, False)(range(25), torch.zeros(25, 3, 4), 2, seeded(), 0)
    for bounds in (dict(min_gap=0), dict(min_gap=30, max_gap=20), dict(initial_max_gap=20), dict(initial_max_gap=200)):
        with pytest.raises(ValueError, match="frame gap .* expected 1 <= "):
            BoundedGapSampler(6, False, **bounds)


# Angular groups


def test_views_are_ordered_by_azimuth_from_the_first_on():
    shuffled = torch.randperm(40, generator=seeded())
    order = azimuth_order(orbit(shuffled * 2 * math.pi / 40))
    assert [int(shuffled[i]) for i in order] == [(int(shuffled[0]) + k) % 40 for k in range(40)]


def test_cameras_without_a_common_up_are_ordered_around_the_axis_of_least_variance():
    shuffled = torch.randperm(12, generator=seeded(1))
    poses = orbit(shuffled * 2 * math.pi / 12)
    poses[::2, :, :2] *= -1  # every other camera upside down
    numbers = [int(shuffled[i]) for i in azimuth_order(poses)]
    turn = {(b - a) % 12 for a, b in zip(numbers, numbers[1:])}
    assert turn in ({1}, {11}) and numbers[0] == shuffled[0]
    assert all(azimuth_order(transformed(poses, seed)) == azimuth_order(poses) for seed in range(5))


def test_cameras_with_a_common_up_are_ordered_around_it_however_high_they_are():
    angles = torch.arange(10) * 2.5  # a spiral, higher than wide
    poses = torch.stack([look_at(torch.stack([a.cos(), a.sin(), torch.tensor(0.0)])) for a in angles])[:, :3]
    poses[:, 2, 3] = torch.arange(10) * 2.0
    assert azimuth_order(poses) == (angles % (2 * math.pi)).argsort().tolist()


@pytest.mark.parametrize("num_context_views", [2, 3, 4])
def test_each_arc_gives_one_context_view(num_context_views):
    shuffled = torch.randperm(24, generator=seeded())
    poses, generator = orbit(shuffled * 2 * math.pi / 24), seeded()
    sampler, size = AngularGroupSampler(4, targets_include_context=False), 24 // num_context_views
    context, targets = Counter(), Counter()
    for _ in range(1200):
        choice = sampler(range(24), poses, num_context_views, generator, 0)
        numbers = sorted(int(shuffled[frame]) for frame in choice.context)
        # Some rotation cuts the circle into arcs with one of them in each.
        assert any(
            sorted((number - start) % 24 // size for number in numbers) == list(range(num_context_views))
            for start in range(size)
        )
        context.update(choice.context)
        targets.update(choice.target)
    assert_uniform(context, range(24))
    assert_uniform(targets, range(24))


def test_arcs_start_anywhere_and_give_any_of_their_views():
    sampler, generator = AngularGroupSampler(1, targets_include_context=False), seeded()
    poses, pairs = orbit(torch.arange(8) * 2 * math.pi / 8), Counter()
    for _ in range(3200):
        a, b = sorted(sampler(range(8), poses, 2, generator, 0).context)
        pairs[a, b] += 1
    # Two views d apart are in different halves for d of the 4 cuts, and each is drawn from its 4 views.
    for (a, b), count in pairs.items():
        expected = 50 * min(b - a, 8 - (b - a))
        assert abs(count - expected) < 4 * math.sqrt(expected)
    assert len(pairs) == 28


def test_groups_are_nearly_equal_where_views_do_not_divide():
    generator = seeded()
    sampler, poses = AngularGroupSampler(1, targets_include_context=False), orbit(torch.arange(7) * 2 * math.pi / 7)
    steps = Counter()
    for _ in range(500):
        a, b, c = sorted(sampler(range(7), poses, 3, generator, 0).context)
        steps.update((b - a, c - b, a + 7 - c))
    assert max(steps) <= 4  # groups of 2, 2 and 3 views: at most 3 views between two neighbours


@pytest.mark.parametrize("sampler_class", [AngularGroupSampler, FarthestPointSampler, NearestViewSampler])
def test_choices_by_the_cameras_are_independent_of_the_world(sampler_class):
    sampler, poses = sampler_class(5, targets_include_context=False), poses_around(20)
    for seed in range(20):
        moved = transformed(poses, seed)
        assert sampler(range(20), poses, 4, seeded(seed), 0) == sampler(range(20), moved, 4, seeded(seed), 0)


# Farthest point


def test_farthest_point_views_are_spread_and_independent_of_order():
    angles = torch.tensor([0.0, 0.1, 0.2, 1.6, 1.7, 3.1, 3.2, 4.7])
    poses = orbit(angles)
    chosen = farthest_point_views(poses, 4)
    assert sorted(int(angles[i] / 1.5) for i in chosen) == [0, 1, 2, 3]
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    assert {int(order[i]) for i in farthest_point_views(poses[order], 4)} == set(chosen)


def test_cameras_at_one_place_are_spread_by_where_they_look():
    poses = poses_around(24)
    poses[:, :, 3] = 0
    chosen = farthest_point_views(poses, 4)
    cosines = poses[chosen, :, 2] @ poses[chosen, :, 2].T
    assert (cosines - 2 * torch.eye(4)).max() < 0.5


def test_cameras_that_look_one_way_are_spread_by_where_they_are():
    poses = torch.eye(4)[:3].repeat(5, 1, 1)
    poses[:, 0, 3] = torch.tensor([3.0, 0.0, 1.0, 10.0, 6.0])
    assert farthest_point_views(poses, 4, first=1) == [1, 3, 4, 0]
    assert sorted(farthest_point_views(poses[[0, 0, 0]], 3)) == [0, 1, 2]


@pytest.mark.parametrize("first", [None, 0, 7])
def test_fewer_farthest_point_views_are_the_beginning_of_more(first):
    poses = poses_around(12)
    every = farthest_point_views(poses, 12, first)
    assert sorted(every) == list(range(12)) and (first is None or every[0] == first)
    assert all(farthest_point_views(poses, count, first) == every[:count] for count in range(1, 12))
    assert farthest_point_views(poses, 20, first) == every


def test_farthest_point_context_starts_anywhere():
    sampler, poses, generator = FarthestPointSampler(3, targets_include_context=False), poses_around(10), seeded()
    firsts, targets = Counter(), Counter()
    for _ in range(1000):
        choice = sampler(range(10), poses, 4, generator, 0)
        assert list(choice.context) == farthest_point_views(poses, 4, choice.context[0])
        firsts[choice.context[0]] += 1
        targets.update(choice.target)
    assert_uniform(firsts, range(10))
    assert set(targets) == set(range(10))


# Nearest


def nearest(poses: torch.Tensor, camera: torch.Tensor, count: int) -> list[int]:
    return nearest_views(poses, camera[None], count)[0].tolist()


def test_nearest_views_are_near_in_place_and_direction():
    poses = orbit(torch.tensor([0.0, 1.0, 0.3, 3.0, 0.1]))
    assert nearest(poses, poses[0], 5) == [0, 4, 2, 1, 3]
    assert nearest(poses, poses[3], 2) == [3, 1]
    # At one place, only the direction tells, and the same poses keep their order.
    poses[:, :, 3] = 0
    assert nearest(poses[[3, 0, 4, 0]], poses[0], 4) == [1, 3, 2, 0]
    # In one direction, only the place.
    poses[:, :, :3] = torch.eye(3)
    poses[:, 0, 3] = torch.tensor([5.0, 1.0, -2.0, 0.0, 4.0])
    assert nearest(poses, poses[1], 4) == [1, 3, 2, 4]


def test_nearest_views_score_distance_in_extents_and_angle_alike():
    poses = torch.eye(4)[:3].repeat(4, 1, 1)
    poses[:, 0, 3] = torch.tensor([-2.0, 2.0, 0.0, 1.0])  # mean 0.25, so the extent is 2.25
    poses[2, :, [0, 2]] = poses[2, :, [2, 0]] * torch.tensor([-1.0, 1.0])  # a quarter turn: 1 - cos = 1
    # From the camera at -2: 4 / 2.25, 2 / 2.25 + 1 and 3 / 2.25.
    assert nearest(poses, poses[0], 4) == [0, 3, 1, 2]


def test_nearest_views_are_independent_of_the_world():
    poses = poses_around(30)
    for seed in range(10):
        moved = transformed(poses, seed)
        assert nearest(moved, moved[seed], 30) == nearest(poses, poses[seed], 30)


def test_nearest_others_are_the_nearest_without_the_view_itself():
    poses = poses_around(9)
    poses[4] = poses[0]  # a copy of a view is another view
    others = nearest_others(poses).tolist()
    for view in range(9):
        assert others[view] == [i for i in nearest(poses, poses[view], 9) if i != view]
    assert others[0][0] == 4 and others[4][0] == 0 and nearest_others(poses[:1]).shape == (1, 0)


@pytest.mark.parametrize("targets_include_context", [False, True])
def test_the_anchor_is_a_target_and_its_neighbours_are_dealt_at_random(targets_include_context):
    sampler, generator = NearestViewSampler(3, targets_include_context), seeded()
    poses = poses_around(16)
    anchors, ranks = Counter(), Counter()
    for _ in range(2000):
        choice = sampler(range(16), poses, 2, generator, 0)
        anchor = choice.target[0]
        near = nearest(poses, poses[anchor], 5)[1:]
        assert anchor not in choice.context and {*choice.context, *choice.target[1:]} <= set(near)
        anchors[anchor] += 1
        ranks.update(near.index(frame) for frame in choice.context)
    assert_uniform(anchors, range(16))
    assert_uniform(ranks, range(4))


def test_views_with_one_pose_can_be_dealt():
    choice = NearestViewSampler(2, targets_include_context=False)(range(9), torch.zeros(9, 3, 4), 3, seeded(), 0)
    assert len({*choice.context, *choice.target}) == 5


# Number of context views


def test_numbers_of_context_views_are_uniform_over_steps():
    drawn = [draw_num_context_views((1, 8), 3, step) for step in range(4000)]
    assert_uniform(Counter(drawn), range(1, 9))
    pairs = [8 * (a - 1) + b - 1 for a, b in zip(drawn[::2], drawn[1::2])]
    assert_uniform(Counter(pairs), range(64))  # neighbouring steps have nothing to do with each other


def test_numbers_of_context_views_depend_on_seed_and_step_alone():
    first = [draw_num_context_views((1, 8), 0, step) for step in range(100)]
    torch.manual_seed(7)
    assert [draw_num_context_views((1, 8), 0, step) for step in range(100)] == first
    other = [draw_num_context_views((1, 8), 1, step) for step in range(100)]
    assert sum(a == b for a, b in zip(first, other)) < 30
    assert draw_num_context_views((2, 2), 0, 5) == 2
