"""Where boxes go: downwards along every edge, apart from each other, straight where they can be."""

import random

import pytest

from fastrbn.graph import layout


def overlap(places, sizes):
    for i, ((ax, ay), (aw, ah)) in enumerate(zip(places, sizes)):
        for (bx, by), (bw, bh) in zip(places[:i], sizes[:i]):
            if abs(ax - bx) < (aw + bw) / 2 - 1e-9 and abs(ay - by) < (ah + bh) / 2 - 1e-9:
                return True
    return False


@pytest.mark.parametrize("seed", range(6))
def test_edges_go_down_and_boxes_stay_apart_in_any_graph(seed):
    rng = random.Random(seed)
    n = rng.randint(2, 30)
    edges = sorted({tuple(sorted(rng.sample(range(n), 2))) for _ in range(rng.randint(1, 2 * n))})
    sizes = [(rng.uniform(0.3, 2), 0.3) for _ in range(n)]
    places, routes = layout.layered(sizes, edges)
    assert len(places) == n and len(routes) == len(edges)
    assert not overlap(places, sizes)
    for (a, b), route in zip(edges, routes):
        assert all(upper[1] > lower[1] for upper, lower in zip(route, route[1:]))
        assert (route[0][0], route[-1][0]) == (places[a][0], places[b][0])
    for columns in (2, 5):
        moved, found = layout.in_columns(places, routes, sizes, edges, columns)
        assert not overlap(moved, sizes) and len(found) == len(edges)


def test_a_chain_with_parameters_beside_it_is_straight():
    # 0 → 1 → 2 → 3, each with a parameter of its own
    edges = [(0, 1), (1, 2), (2, 3), (4, 1), (5, 2), (6, 3), (7, 3)]
    sizes = [(1.0, 0.3)] * 4 + [(0.5, 0.3)] * 4
    places, _ = layout.layered(sizes, edges, [False] * 4 + [True] * 4)
    xs = [x for x, _ in places[:4]]
    assert max(xs) - min(xs) < 0.05
    assert places[5][1] == places[1][1], "a parameter stands in the row above its use"


def test_two_crossing_edges_are_uncrossed():
    places, _ = layout.layered([(1, 0.3)] * 4, [(0, 3), (1, 2)])
    assert (places[0][0] < places[1][0]) == (places[3][0] < places[2][0])


def test_nothing_and_one_box_are_placed():
    assert layout.layered([], []) == ([], [])
    assert layout.layered([(1, 1)], [])[0] == [(0.0, -0.5)]
