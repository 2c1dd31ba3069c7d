import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.dataset.buckets import centred
from library.dataset.config import DatasetConfig, SubsetConfig
from library.dataset.plan import Bucket, Draw, RunPlan, make_plan, rng
from library.dataset.scan import NO_MASK, Sample

SUBSET = SubsetConfig(Path("images"))


def bucket(dataset, size, batch_size, first, repeats) -> Bucket:
    return Bucket(dataset, size, batch_size, tuple(range(first, first + len(repeats))), tuple(repeats))


PLAN = RunPlan(
    buckets=(
        bucket(0, (512, 512), 2, 0, [1, 3, 1]),  # 5 draws: 3 batches
        bucket(0, (640, 384), 2, 3, [2, 2]),  # 4 draws: 2 batches
        bucket(1, (512, 512), 4, 5, [1, 1, 1, 1, 1]),  # 5 draws: 2 batches
    ),
    seed=42,
)


def epoch_of(plan, epoch=1) -> list[tuple[Draw, ...]]:
    count = plan.batches_per_epoch
    return list(islice(plan.batches((epoch - 1) * count), count))


plans = st.builds(
    lambda counts, seed, accumulation: RunPlan(
        buckets=tuple(
            bucket(0, (64 * number, 64), batch_size, 100 * number, repeats)
            for number, (batch_size, repeats) in enumerate(counts)
        ),
        seed=seed,
        gradient_accumulation_steps=accumulation,
    ),
    st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=9)), min_size=1, max_size=4),
    st.integers(0, 2**32),
    st.integers(1, 4),
)


@settings(deadline=None)
@given(plans, st.integers(1, 3))
def test_an_epoch_draws_every_image_exactly_as_often_as_its_repeats(plan, epoch):
    batches = epoch_of(plan, epoch)
    drawn = Counter((draw.sample, draw.repeat) for batch in batches for draw in batch)
    wanted = {
        (sample, repeat)
        for group in plan.buckets
        for sample, repeats in zip(group.samples, group.repeats, strict=True)
        for repeat in range(repeats)
    }
    assert set(drawn) == wanted
    assert set(drawn.values()) == {1}
    assert {draw.epoch for batch in batches for draw in batch} == {epoch}


@settings(deadline=None)
@given(plans)
def test_a_batch_holds_one_bucket_and_no_more_than_its_batch_size(plan):
    bucket_of = {sample: group for group in plan.buckets for sample in group.samples}
    for batch in epoch_of(plan):
        groups = {bucket_of[draw.sample] for draw in batch}
        assert len(groups) == 1
        assert 1 <= len(batch) <= groups.pop().batch_size


@settings(deadline=None)
@given(plans, st.integers(0, 60))
def test_a_plan_continues_from_any_batch_as_if_it_had_never_stopped(plan, start):
    assert list(islice(plan.batches(start), 10)) == list(islice(plan.batches(), start, start + 10))


@settings(deadline=None)
@given(plans)
def test_the_draws_of_a_step_are_those_that_the_optimizer_waits_for(plan):
    steps, current = [], []
    for number, batch in enumerate(islice(plan.batches(), 3 * plan.batches_per_epoch)):
        current.append({draw.step for draw in batch})
        if plan.ends_step(number):
            steps.append(current)
            current = []
    assert not current
    assert len(steps) == 3 * plan.steps_per_epoch
    for number, draws in enumerate(steps):
        assert len(draws) <= plan.gradient_accumulation_steps
        assert set.union(*draws) == {number}


@settings(deadline=None)
@given(plans, st.integers(0, 40))
def test_the_first_batch_of_a_step_belongs_to_it_and_the_one_before_does_not(plan, step):
    first = plan.first_batch_of(step)
    assert {draw.step for draw in next(plan.batches(first))} == {step}
    if step:
        assert {draw.step for draw in next(plan.batches(first - 1))} == {step - 1}


def test_numbers_of_a_plan_worked_out_by_hand():
    assert PLAN.batches_per_epoch == 7
    assert replace(PLAN, gradient_accumulation_steps=3).steps_per_epoch == 3


def test_the_order_changes_from_epoch_to_epoch_and_from_seed_to_seed():
    orders = [
        [(draw.sample, draw.repeat) for batch in epoch_of(plan, epoch) for draw in batch]
        for plan, epoch in ((PLAN, 1), (PLAN, 2), (replace(PLAN, seed=43), 1))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_an_image_leaves_its_place_in_its_bucket_to_any_other():
    partners = Counter()
    plan = RunPlan((bucket(0, (64, 64), 2, 0, [1] * 4),), seed=0)
    for epoch in range(1, 301):
        for batch in epoch_of(plan, epoch):
            samples = {draw.sample for draw in batch}
            if 0 in samples:
                partners.update(samples - {0})
    assert set(partners) == {1, 2, 3}
    assert min(partners.values()) > 60  # 100 each on average


def sample(dataset, size, num_repeats) -> Sample:
    return Sample(Path("a.png"), ("",), SUBSET, dataset, False, num_repeats, 1, centred(size, size, size), NO_MASK)


def test_images_of_two_datasets_never_share_a_batch_though_their_size_is_the_same():
    configs = [DatasetConfig((64, 64), (SUBSET,), batch_size=8), DatasetConfig((64, 64), (SUBSET,), batch_size=3)]
    samples = [sample(0, (64, 64), 2), sample(1, (64, 64), 1), sample(0, (128, 64), 1), sample(1, (64, 64), 5)]
    plan = make_plan(configs, samples, seed=0)
    assert [(group.samples, group.repeats, group.batch_size) for group in plan.buckets] == [
        ((0,), (2,), 8),
        ((2,), (1,), 8),
        ((1, 3), (1, 5), 3),
    ]


def test_several_processes_share_batches_that_are_so_many_times_larger():
    samples = [sample(0, (64, 64), 5), sample(0, (128, 64), 3)]
    several = make_plan([DatasetConfig((64, 64), (SUBSET,), batch_size=2)], samples, seed=3, num_processes=2)
    assert several == make_plan([DatasetConfig((64, 64), (SUBSET,), batch_size=4)], samples, seed=3)


DRAW = Draw(sample=3, repeat=1, epoch=2, step=17)


def test_a_draw_s_generator_depends_on_epoch_image_repeat_and_seed_alone():
    value = rng(1, DRAW, "a.png").random()
    assert rng(1, replace(DRAW, sample=9, step=99), "a.png").random() == value
    others = [
        rng(2, DRAW, "a.png"),
        rng(1, replace(DRAW, repeat=2), "a.png"),
        rng(1, replace(DRAW, epoch=3), "a.png"),
        rng(1, DRAW, "b.png"),
    ]
    assert value not in [other.random() for other in others]


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_a_draw_s_generator_is_the_same_in_every_python(hash_seed):
    code = "from library.dataset.plan import *; print(rng(1, Draw(3, 1, 2, 17), 'a.png').random())"
    path = str(Path(__file__).parents[2])
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert printed.stdout.strip() == str(rng(1, DRAW, "a.png").random())
