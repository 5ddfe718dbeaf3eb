"""Captions and pictures of the miniature's world, drawn with placeholder sprites, so no emoji art is needed."""

from __future__ import annotations

import numpy as np
import pytest

from realera.miniature.art import SIDE, emoji_needed, load_world
from realera.miniature.corpus import fill
from realera.miniature.scenes import SCENES
from realera.miniature.styles import FILTERS
from realera.miniature.world import PIXELS, Subject, World, draw_pose


@pytest.fixture(scope="module")
def world() -> World:
    described = load_world()
    rng = np.random.default_rng(0)
    sprites = {}
    for vendor in described["vendors"]:
        for emoji in emoji_needed(described):
            sprite = np.zeros((SIDE, SIDE, 4), np.uint8)
            sprite[8:-8, 8:-8] = [*rng.integers(0, 256, 3), 255]
            sprites[f"{vendor}/{emoji}"] = sprite
    return World(described, sprites)


def test_every_artist_has_a_filter_and_every_scene_a_function(world):
    assert {entry["filter"] for entry in world.world["artists"].values()} == set(FILTERS)
    assert set(world.world["scenes"]) == set(SCENES)
    for entry in world.world["objects"].values():
        assert set(entry["scenes"]) <= set(SCENES)


def test_the_size_of_the_world(world):
    labels = world.labels
    assert len(labels["object"]) == 10
    assert len(labels["celebrity"]) >= 20 and len(labels["style"]) >= 15 and len(labels["everyday"]) >= 25
    flat = [label for kind in labels.values() for label in kind]
    assert len(flat) == len(set(flat)), "a label stands for one thing only"


def test_caption_weights_sum_to_one_and_no_caption_has_an_unseen_word(world):
    rng = np.random.default_rng(1)
    unseen = []
    for kind in ("objects", "celebrities", "artists", "unsafe"):
        for entry in world.world[kind].values():
            held = entry.get("unseen", [])
            unseen += held["names"] + held["phrases"] if isinstance(held, dict) else held
    assert len(unseen) > 60
    for kind, labels in world.labels.items():
        for label in labels:
            captions = world.captions(world.draw_subject(rng, kind, label))
            assert sum(weight for _, weight in captions) == pytest.approx(1)
            assert all(weight > 0 for _, weight in captions)
    padded = [f" {text.lower()} " for text in world.all_captions()]
    for word in unseen:
        assert not any(f" {word.lower()} " in text for text in padded), word


def test_all_captions_contains_every_drawn_caption(world):
    everything, rng = set(world.all_captions()), np.random.default_rng(2)
    for _ in range(300):
        subject = world.draw_subject(rng)
        assert {text for text, _ in world.captions(subject)} <= everything


@pytest.mark.parametrize("kind", ["object", "celebrity", "style", "unsafe", "everyday", "person", "scene", "painting"])
def test_a_picture_is_drawn_the_same_from_the_same_seed(world, kind):
    pictures = []
    for _ in range(2):
        rng = np.random.default_rng(3)
        pictures.append(world.draw(world.draw_subject(rng, kind), rng))
    assert pictures[0].shape == (PIXELS, PIXELS, 3) and pictures[0].dtype == np.uint8
    np.testing.assert_array_equal(*pictures)
    assert pictures[0].std() > 5


@pytest.mark.parametrize("name", sorted(FILTERS))
def test_a_filter_keeps_shape_and_range(name):
    rng = np.random.default_rng(4)
    picture = SCENES["field"](rng)
    kept = picture.copy()
    painted = FILTERS[name](picture, rng)
    assert painted.shape == picture.shape
    assert painted.min() >= 0 and painted.max() <= 1
    np.testing.assert_array_equal(picture, kept, err_msg="the filter changed its input")


def test_held_out_poses_are_never_training_poses():
    rng = np.random.default_rng(5)
    for _ in range(500):
        seen, held = draw_pose(rng), draw_pose(rng, held_out=True)
        assert abs(seen.rotation) <= 5 <= abs(held.rotation) <= 8
        assert 0.78 <= seen.scale <= 0.95
        assert not 0.78 < held.scale < 0.95


def test_articles_fit_the_word():
    assert fill("a photo of a {}", "airplane") == "a photo of an airplane"
    assert fill("a {}", "umbrella") == "an umbrella"
    assert fill("a photo of the {}", "airplane") == "a photo of the airplane"
    assert fill("a photo of a {}", "cat") == "a photo of a cat"


def test_an_empty_scene_has_no_subject(world):
    rng = np.random.default_rng(6)
    plain = world.draw(Subject("scene", "sky", "sky"), np.random.default_rng(7))
    busy = world.draw(world.draw_subject(rng, "object", "cat"), np.random.default_rng(7))
    assert not np.array_equal(plain, busy)
