"""Placing the boxes of a graph in layers from inputs down to the result (after Sugiyama, Tagawa and Toda, 1981).

Sizes and places are in inches, with y upwards; a place is a box's centre. A route is the points an edge passes through.
"""

from __future__ import annotations

import collections
import itertools
import shutil
import subprocess
from collections.abc import Sequence

Point = tuple[float, float]
Edge = tuple[int, int]

_ROW_GAP, _BOX_GAP, _LANE = 0.26, 0.22, 0.12  # gap between layers, between boxes; width of an edge that passes a layer
_COLUMN_GAP = 0.5
_SWEEPS = 12
_MINOR = 1e-3  # weight of a parameter's place, so that operations stand in line


def layered(
    sizes: Sequence[Point], edges: Sequence[Edge], minor: Sequence[bool] = ()
) -> tuple[list[Point], list[list[Point]]]:
    """Place boxes in layers and route the edges between them.

    `sizes` are [(width, height)] and `edges` [(from, to)] without cycles. `minor` boxes (parameters) stand beside their
    user rather than above it. Returns the centre of each box and the points of each edge.
    """
    layer = _layers(len(sizes), edges)
    sizes, chains = list(sizes), []
    minor = [*minor, *[False] * (len(sizes) - len(minor))]
    for a, b in edges:
        chain = [a]
        for level in range(layer[a] + 1, layer[b]):  # an edge over several layers gets a lane in each
            chain.append(len(sizes))
            sizes.append((_LANE, 0.0))
            layer.append(level)
            minor.append(False)
        chains.append([*chain, b])
    links = [pair for chain in chains for pair in itertools.pairwise(chain)]
    rows = _ordered(layer, links)
    x = _across(rows, links, sizes, minor)
    y = _down(rows, sizes)
    places = [(x[i], y[layer[i]]) for i in range(len(sizes))]
    routes = []
    for chain in chains:
        (ax, ay), (bx, by) = places[chain[0]], places[chain[-1]]
        ends = (ax, ay - sizes[chain[0]][1] / 2), (bx, by + sizes[chain[-1]][1] / 2)
        routes.append([ends[0], *(places[i] for i in chain[1:-1]), ends[1]])
    return places[: len(sizes) - sum(len(c) - 2 for c in chains)], routes


def _layers(n: int, edges: Sequence[Edge]) -> list[int]:
    """The longest path from an input; boxes with no more inputs than users move down to their users."""
    before: dict[int, list[int]] = collections.defaultdict(list)
    after: dict[int, list[int]] = collections.defaultdict(list)
    waiting = [0] * n
    for a, b in edges:
        before[b].append(a)
        after[a].append(b)
        waiting[b] += 1
    layer, order = [0] * n, [i for i in range(n) if not waiting[i]]
    for i in order:  # grows during the loop
        for j in after[i]:
            layer[j] = max(layer[j], layer[i] + 1)
            waiting[j] -= 1
            if not waiting[j]:
                order.append(j)
    for i in reversed(order):
        if after[i] and len(before[i]) <= len(after[i]):
            layer[i] = min(layer[j] for j in after[i]) - 1
    return layer


def _ordered(layer: list[int], links: list[Edge]) -> list[list[int]]:
    """Rows ordered by the mean of their neighbours, swept down and up; the order with the fewest crossings wins."""
    rows: list[list[int]] = [[] for _ in range(max(layer, default=-1) + 1)]
    for i, level in enumerate(layer):
        rows[level].append(i)
    up: dict[int, list[int]] = collections.defaultdict(list)
    down: dict[int, list[int]] = collections.defaultdict(list)
    for a, b in links:
        up[b].append(a)
        down[a].append(b)
    best, fewest = [list(row) for row in rows], _crossings(rows, down)
    for sweep in range(_SWEEPS):
        if not fewest:
            break
        near = up if sweep % 2 == 0 else down
        for row in rows if sweep % 2 == 0 else reversed(rows):
            place = {i: k for r in rows for k, i in enumerate(r)}
            row.sort(key=lambda i: sum(place[j] for j in near[i]) / len(near[i]) if near[i] else place[i])
        crossings = _crossings(rows, down)
        if crossings < fewest:
            best, fewest = [list(row) for row in rows], crossings
    return best


def _crossings(rows: list[list[int]], down: dict[int, list[int]]) -> int:
    total = 0
    for upper, lower in itertools.pairwise(rows):
        place = {i: k for k, i in enumerate(lower)}
        ends = [place[j] for i in upper for j in sorted(down[i], key=place.__getitem__)]
        total += sum(a > b for k, a in enumerate(ends) for b in ends[k + 1 :])
    return total


def _across(rows: list[list[int]], links: list[Edge], sizes: list[Point], minor: list[bool]) -> list[float]:
    """x of each box: near the mean of its neighbours, at a distance from the boxes beside it."""
    up: dict[int, list[tuple[int, float]]] = collections.defaultdict(list)
    down: dict[int, list[tuple[int, float]]] = collections.defaultdict(list)
    for a, b in links:
        up[b].append((a, _MINOR if minor[a] else 1.0))
        down[a].append((b, 1.0))
    x, offsets = [0.0] * len(sizes), [0.0] * len(sizes)
    for row in rows:
        for left, i in itertools.pairwise(row):
            offsets[i] = offsets[left] + (sizes[left][0] + sizes[i][0]) / 2 + _BOX_GAP
        for i in row:
            x[i] = offsets[i] - offsets[row[-1]] / 2
    for sweep in range(2 * _SWEEPS):  # from above and from below in turn, at the end from both
        downwards, both = sweep % 2 == 0, sweep >= 2 * _SWEEPS - 2
        for row in rows if downwards else reversed(rows):
            near = [up[i] + down[i] if both else (up if downwards else down)[i] for i in row]
            wanted = [_mean(x, ends, x[i]) for i, ends in zip(row, near)]
            weights = [_MINOR if minor[i] or not ends else 1.0 for i, ends in zip(row, near)]
            for i, place in zip(row, _spaced(wanted, weights, [offsets[i] for i in row])):
                x[i] = place
    return x


def _mean(x: list[float], links: list[tuple[int, float]], alone: float) -> float:
    total = sum(w for _, w in links)
    return sum(x[i] * w for i, w in links) / total if total else alone


def _spaced(wanted: list[float], weights: list[float], offsets: list[float]) -> list[float]:
    """The places nearest to the wanted ones that keep the distances, by pooling neighbours that are too close."""
    pools: list[tuple[float, float, int]] = []  # (weighted mean of place minus offset, weight, number of boxes)
    for w, weight, offset in zip(wanted, weights, offsets):
        pools.append((w - offset, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, m, k), (value, mass, n) = pools[-2:]
            pools[-2:] = [((left * m + value * mass) / (m + mass), m + mass, k + n)]
    flat = [value for value, _, n in pools for _ in range(n)]
    return [value + offset for value, offset in zip(flat, offsets)]


def _down(rows: list[list[int]], sizes: list[Point]) -> list[float]:
    """y of each row."""
    y: list[float] = []
    at = 0.0
    for row in rows:
        height = max(sizes[i][1] for i in row)
        y.append(at - height / 2)
        at -= height + _ROW_GAP
    return y


def in_columns(
    places: list[Point], routes: list[list[Point]], sizes: list[Point], edges: Sequence[Edge], columns: int
) -> tuple[list[Point], list[list[Point]]]:
    """Cut a tall picture into columns of equal height, side by side; edges across a cut go up between the columns."""
    if columns == 1 or len(places) < 2:
        return places, routes
    top, low = max(y for _, y in places), min(y for _, y in places)
    height = (top - low) / columns * (1 + 1e-9) or 1.0
    column = [min(int((top - y) / height), columns - 1) for _, y in places]
    first = {c: max((y for (_, y), k in zip(places, column) if k == c), default=top) for c in range(columns)}
    lanes, shifts, at = [], [], 0.0
    for c in range(columns):
        inside = [(x, w) for (x, _), (w, _), k in zip(places, sizes, column) if k == c]
        left, right = min((x - w / 2 for x, w in inside), default=0), max((x + w / 2 for x, w in inside), default=0)
        shifts.append((at - left, top - first[c]))
        at += right - left + _COLUMN_GAP
        lanes.append(at - _COLUMN_GAP / 2)

    def moved(point: Point, c: int) -> Point:
        return point[0] + shifts[c][0], point[1] + shifts[c][1]

    found = []
    for (a, b), route in zip(edges, routes):
        if column[a] == column[b]:
            found.append([moved(p, column[a]) for p in route])
        else:  # up the lane before the other column and into the box from above
            (ax, ay), (bx, by) = moved(route[0], column[a]), moved(route[-1], column[b])
            found.append([(ax, ay), (lanes[column[b] - 1], ay), (lanes[column[b] - 1], by), (bx, by)])
    return [moved(p, c) for p, c in zip(places, column)], found


def by_graphviz(sizes: list[Point], edges: Sequence[Edge]) -> tuple[list[Point], list[list[Point]]]:
    """Places and routes computed by Graphviz's `dot`. Raises RuntimeError if it is not installed."""
    program = shutil.which("dot")
    if program is None:
        raise RuntimeError(
            'engine="dot" needs Graphviz\'s program dot, which is not on the PATH: install Graphviz or leave engine out'
        )
    lines = [f'n{i} [shape=box, fixedsize=true, label="", width={w}, height={h}];' for i, (w, h) in enumerate(sizes)]
    lines += [f"n{a} -> n{b};" for a, b in edges]
    text = "digraph { ranksep=0.25; nodesep=0.2;\n" + "\n".join(lines) + "\n}"
    done = subprocess.run([program, "-Tplain"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"dot failed with status {done.returncode}: {done.stderr.strip()}")
    places: dict[str, Point] = {}
    routes: dict[tuple[str, str], list[Point]] = {}
    for line in done.stdout.splitlines():
        words = line.split()
        if words[:1] == ["node"]:
            places[words[1]] = float(words[2]), float(words[3])
        elif words[:1] == ["edge"]:
            numbers = [float(v) for v in words[4 : 4 + 2 * int(words[3])]]
            routes[words[1], words[2]] = list(zip(numbers[::2], numbers[1::2]))
    order = [routes[f"n{a}", f"n{b}"] for a, b in edges]
    # the points are control points of a spline: every third one is on the line
    return [places[f"n{i}"] for i in range(len(sizes))], [points[::3] for points in order]
