"""The whole pipeline once more, slowly: the text of Mask Transfiner, Sec. 3.1 to 3.4, as loops in float64.

A cell is a key ``(roi, row, col)``, a quadtree level a dict from cells to what is known of them, a sequence a list of
vectors. Nothing is flattened, grouped or gathered. It shares configuration and weights with the package, but no code.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from transfiner_refine.config import TransfinerConfig

Array = np.ndarray
Cell = tuple[int, int, int]

ROOT_SIDE = 28
REFERENCE_SIDE = 14
LOGIT_LIMIT = 3.0
OFFSETS = [(row, col) for row in (-1, 0, 1) for col in (-1, 0, 1)]


@dataclass
class Scene:
    """What is refined: feature maps ``(B, C, H_l, W_l)``, RoIs ``(R, 4)`` in their frame, each RoI's image."""

    maps: list[Array]
    strides: tuple[int, ...]
    rois: Array
    image: list[int]
    canonical_level: int = 4


@dataclass
class Network:
    """The state dict of a ``MaskTransfiner`` as float64 arrays, and its configuration."""

    weights: Mapping[str, Array]
    settings: TransfinerConfig

    def linear(self, name: str, x: Array) -> Array:
        """A fully connected layer, or a convolution of one cell."""
        bias = self.weights[f"{name}.bias"]
        return self.weights[f"{name}.weight"].reshape(len(bias), -1) @ x + bias

    def norm(self, name: str, x: Array) -> Array:
        """Layer norm of one token."""
        scale = math.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
        return (x - x.mean()) / scale * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


@dataclass
class Detected:
    """Incoherence logits of the judged cells and the cells kept as nodes, by level; features ``(C, 28, 28)`` by RoI."""

    candidates: list[dict[Cell, float]] = field(default_factory=list)
    nodes: list[list[Cell]] = field(default_factory=list)
    root_features: list[Array] = field(default_factory=list)


@dataclass
class Refined:
    """Every step's result: nodes, their refined logits, the RoIs' probabilities, and which cells a node gave."""

    found: Detected
    logits: list[dict[Cell, float]]
    probs: Array
    touched: Array


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def relu(x: Array) -> Array:
    return np.maximum(x, 0.0)


# Sec. 3.1: incoherent regions


def incoherence(mask: Array) -> Array:
    """Eq. 1 for one mask ``(2S, 2S)``: down and up by nearest neighbour, XOR, OR-pool to ``(S, S)``."""
    side = len(mask) // 2
    down = [[bool(mask[2 * row, 2 * col]) for col in range(side)] for row in range(side)]
    up = [[down[row // 2][col // 2] for col in range(2 * side)] for row in range(2 * side)]
    lost = [[up[row][col] != bool(mask[row, col]) for col in range(2 * side)] for row in range(2 * side)]
    pooled = np.zeros((side, side), bool)
    for row, col in np.ndindex(mask.shape):
        pooled[row // 2, col // 2] |= lost[row][col]
    return pooled


def incoherence_levels(mask: Array, depth: int) -> list[Array]:
    """Incoherence maps, coarsest first; each level's mask is the finer one sampled down by nearest neighbour."""
    maps: list[Array] = []
    for _ in range(depth):
        maps.insert(0, incoherence(mask))
        mask = np.array([[mask[2 * row, 2 * col] for col in range(len(mask) // 2)] for row in range(len(mask) // 2)])
    return maps


def cover(maps: Sequence[Array]) -> list[Array]:
    """Mark every ancestor of every marked cell."""
    covered = [level.copy() for level in maps]
    for level, cells in enumerate(maps):
        for row, col in zip(*np.nonzero(cells), strict=True):
            for up in range(1, level + 1):
                covered[level - up][row >> up, col >> up] = True
    return covered


# Sec. 3.4: the RoI pyramid


def roi_level(box: Array, canonical_level: int = 4) -> int:
    """``i = floor(k0 + log2(sqrt(w · h) / 224))``, which feature map ``P_i`` serves the root of a RoI."""
    area = float(box[2] - box[0]) * float(box[3] - box[1])
    return math.floor(canonical_level + math.log2(math.sqrt(area) / 224.0))


def serving_map(scene: Scene, roi: int, level: int) -> int:
    """The map for one quadtree level of a RoI: ``P_(i - level)``, or the nearest one that exists."""
    wanted = roi_level(scene.rois[roi], scene.canonical_level) - level
    levels = [round(math.log2(stride)) for stride in scene.strides]
    return min(range(len(levels)), key=lambda index: abs(levels[index] - wanted))


def bilinear(plane: Array, x: float, y: float) -> Array:
    """Value of a map ``(C, H, W)`` at a point in cells, 0 at the first centre, by RoIAlign's rule at the border."""
    _, height, width = plane.shape
    if x < -1.0 or x > width or y < -1.0 or y > height:
        return np.zeros(len(plane))
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    value = np.zeros(len(plane))
    for row in (math.floor(y), math.floor(y) + 1):
        for col in (math.floor(x), math.floor(x) + 1):
            weight = (1.0 - abs(y - row)) * (1.0 - abs(x - col))
            if weight > 0.0:  # beyond the last row and column the weight is zero
                value += weight * plane[:, row, col]
    return value


def feature(scene: Scene, roi: int, x: float, y: float, level: int) -> Array:
    """Feature at a point of a RoI, given relative to it, for one quadtree level."""
    index = serving_map(scene, roi, level)
    x0, y0, x1, y1 = (float(value) for value in scene.rois[roi])
    stride = scene.strides[index]
    plane = scene.maps[index][scene.image[roi]]
    return bilinear(plane, (x0 + x * (x1 - x0)) / stride - 0.5, (y0 + y * (y1 - y0)) / stride - 0.5)


def centre(row: int, col: int, side: int) -> tuple[float, float]:
    """Centre (x, y) of a cell relative to its RoI."""
    return (col + 0.5) / side, (row + 0.5) / side


# Sec. 3.1 and 3.2: the cascaded detector grows the quadtree


def coarse_levels(coarse: Array, depth: int) -> list[Array]:
    """Coarse masks ``(R, S_l, S_l)`` of all levels, coarsest first: a cell is the mean of its four children."""
    levels = [coarse]
    for _ in range(depth - 1):
        fine, side = levels[0], len(levels[0][0]) // 2
        half = np.zeros((len(fine), side, side))
        for roi, row, col in np.ndindex(half.shape):
            half[roi, row, col] = sum(fine[roi, 2 * row + i, 2 * col + j] for i in (0, 1) for j in (0, 1)) / 4
        levels.insert(0, half)
    return levels


def convolve(network: Network, name: str, plane: Array) -> Array:
    """3×3 convolution of ``(C, S, S)`` with zeros around it, cell by cell."""
    padded = np.pad(plane, ((0, 0), (1, 1), (1, 1)))
    result = np.zeros((len(network.weights[f"{name}.bias"]), *plane.shape[1:]))
    for row, col in np.ndindex(plane.shape[1:]):
        result[:, row, col] = network.linear(name, padded[:, row : row + 3, col : col + 3].ravel())
    return result


def detect(scene: Scene, network: Network, coarse: Sequence[Array], depth: int, threshold: float) -> Detected:
    """Judge all cells of the root, then the children of the cells found incoherent, and so on."""
    found = Detected()
    judged: dict[Cell, Array] = {}
    for roi in range(len(scene.rois)):
        plane = np.zeros((scene.maps[0].shape[1] + 1, ROOT_SIDE, ROOT_SIDE))
        for row, col in np.ndindex(ROOT_SIDE, ROOT_SIDE):
            plane[:-1, row, col] = feature(scene, roi, *centre(row, col, ROOT_SIDE), level=0)
            plane[-1, row, col] = coarse[0][roi, row, col]
        for i in (0, 2, 4, 6):
            plane = relu(convolve(network, f"incoherence_detector.tower.{i}", plane))
        found.root_features.append(plane)
        judged.update({(roi, row, col): plane[:, row, col] for row, col in np.ndindex(ROOT_SIDE, ROOT_SIDE)})
    for level in range(depth):
        if level:
            judged = judge_children(scene, network, coarse[level], level, found.nodes[-1], judged)
        name = f"finer_classifier.{level - 1}" if level else "classifier"
        logits = {cell: float(network.linear(f"incoherence_detector.{name}", x)[0]) for cell, x in judged.items()}
        found.candidates.append(logits)
        found.nodes.append([cell for cell, logit in logits.items() if sigmoid(logit) > threshold])
    return found


def judge_children(
    scene: Scene, network: Network, coarse: Array, level: int, parents: Sequence[Cell], judged: Mapping[Cell, Array]
) -> dict[Cell, Array]:
    """Features that judge the children, at ``level``, of the nodes above: their own, fused with their parents'."""
    children: dict[Cell, Array] = {}
    for roi, row, col in parents:
        for i, j in np.ndindex(2, 2):
            child = (roi, 2 * row + i, 2 * col + j)
            seen = [feature(scene, roi, *centre(*child[1:], ROOT_SIDE * 2**level), level), np.array([coarse[child]])]
            if network.settings.lower_level_guidance:
                seen.append(judged[roi, row, col])
            children[child] = relu(network.linear(f"incoherence_detector.fusion.{level - 1}", np.concatenate(seen)))
    return children


# Sec. 3.3: node encoder, sequence encoder, pixel decoder


def position(x: float, y: float, channels: int, turns: float = 64.0) -> Array:
    """Sines, then cosines, of y and then of x, at geometric frequencies from half a turn to ``turns``."""
    count = channels // 4
    code = []
    for value in (y, x):
        phases = [2 * math.pi * value * 0.5 * (turns / 0.5) ** (i / (count - 1)) for i in range(count)]
        code += [math.sin(phase) for phase in phases] + [math.cos(phase) for phase in phases]
    return np.array(code)


def token(scene: Scene, network: Network, found: Detected, coarse: float, cell: Cell, side: int, level: int) -> Array:
    """One node from its cues; ``level`` -1 is the grid of coarse reference tokens, which sees the root's features."""
    cues, (roi, row, col) = network.settings.node_cues, cell
    x, y = centre(row, col, side)
    parts = []
    if "fine" in cues:
        parts.append(feature(scene, roi, x, y, max(level, 0)))
    if "context" in cues:
        around = [centre(row + i, col + j, side) for i, j in OFFSETS]
        around = np.concatenate([feature(scene, roi, *point, max(level, 0)) for point in around])
        parts.append(relu(network.linear("node_encoder.context", around)))
    if "coarse" in cues:
        parts.append(np.array([coarse]))
    if "guidance" in cues:
        parts.append(bilinear(found.root_features[roi], x * ROOT_SIDE - 0.5, y * ROOT_SIDE - 0.5))
    result = network.linear("node_encoder.fuse", np.concatenate(parts))
    if "position" in cues:
        result = result + position(x, y, len(result))
    if network.settings.level_embedding:
        result = result + network.weights["node_encoder.level.weight"][level + 1]
    return result


def attend(queries: Sequence[Array], keys: Sequence[Array], values: Sequence[Array]) -> list[Array]:
    """Softmax attention of one head over one sequence, query by query."""
    all_keys, all_values = np.array(keys), np.array(values)
    results = []
    for query in queries:
        scores = all_keys @ query / math.sqrt(len(query))
        shares = np.exp(scores - scores.max())
        results.append(shares @ all_values / shares.sum())
    return results


def encode(network: Network, sequence: Sequence[Array], together: Sequence[Hashable] | None = None) -> list[Array]:
    """All layers of the sequence encoder on one sequence: attention and feed-forward, each behind a layer norm.

    The keys and values of tokens with the same label in ``together`` are replaced by their mean, as one key.
    """
    tokens, channels, heads = list(sequence), network.settings.channels, network.settings.heads
    width = channels // heads
    for layer in range(network.settings.layers):
        name = f"sequence_encoder.layers.{layer}"
        qkv = [network.linear(f"{name}.qkv", network.norm(f"{name}.norm_attention", one)) for one in tokens]
        per_head = []
        for head in range(heads):
            q, k, v = (part * channels + head * width for part in range(3))
            queries, keys, values = ([one[first : first + width] for one in qkv] for first in (q, k, v))
            if together is not None:
                keys, values = shared(keys, together), shared(values, together)
            per_head.append(attend(queries, keys, values))
        for i, one in enumerate(tokens):
            one = one + network.linear(f"{name}.project", np.concatenate([results[i] for results in per_head]))
            hidden = relu(network.linear(f"{name}.ffn.0", network.norm(f"{name}.norm_ffn", one)))
            tokens[i] = one + network.linear(f"{name}.ffn.2", hidden)
    return [network.norm("sequence_encoder.norm", one) for one in tokens]


def shared(vectors: Sequence[Array], together: Sequence[Hashable]) -> list[Array]:
    """The mean of the vectors of each label."""
    members: dict[Hashable, list[Array]] = {}
    for vector, label in zip(vectors, together, strict=True):
        members.setdefault(label, []).append(vector)
    return [np.mean(vectors, axis=0) for vectors in members.values()]


def coarse_logit(prob: float) -> float:
    """Logit of a coarse probability, within ±``LOGIT_LIMIT``."""
    if prob <= 0.0 or prob >= 1.0:
        return math.copysign(LOGIT_LIMIT, prob - 0.5)
    return min(max(math.log(prob / (1.0 - prob)), -LOGIT_LIMIT), LOGIT_LIMIT)


def decode(network: Network, encoded: Array, coarse: float) -> float:
    """Refined logit of one node: its label, or a correction to its coarse logit."""
    hidden = relu(network.linear("pixel_decoder.layers.0", encoded))
    logit = float(network.linear("pixel_decoder.layers.2", hidden)[0])
    return logit + coarse_logit(coarse) if network.settings.decoder == "residual" else logit


def refine_nodes(scene: Scene, network: Network, found: Detected, coarse: Sequence[Array]) -> list[dict[Cell, float]]:
    """Refined logits of all nodes, one sequence after the other: nodes and 14×14 reference tokens of one RoI."""
    refined: list[dict[Cell, float]] = [{} for _ in found.nodes]
    levels = list(range(len(found.nodes)))
    for roi in range(len(scene.rois)):
        grid = []
        for row, col in np.ndindex(REFERENCE_SIDE, REFERENCE_SIDE):
            mean = float(coarse[0][roi, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].mean())
            grid.append(token(scene, network, found, mean, (roi, row, col), REFERENCE_SIDE, -1))
        for together in [levels] if network.settings.joint_levels else [[level] for level in levels]:
            members = [(level, cell) for level in together for cell in found.nodes[level] if cell[0] == roi]
            if not members:
                continue
            tokens = [
                token(scene, network, found, float(coarse[level][cell]), cell, ROOT_SIDE * 2**level, level)
                for level, cell in members
            ]
            labels = None
            if network.settings.tree_keys:
                labels = [("tree", row >> level, col >> level) for level, (_, row, col) in members]
                labels += [("grid", row // 2, col // 2) for row, col in np.ndindex(REFERENCE_SIDE, REFERENCE_SIDE)]
            for (level, cell), encoded in zip(members, encode(network, tokens + grid, labels), strict=False):
                refined[level][cell] = decode(network, encoded, float(coarse[level][cell]))
    return refined


# Sec. 3.2: quadtree propagation


def propagate(
    coarse: Sequence[Array], refined: Sequence[Mapping[Cell, float]], hand_down: bool, corrections: bool = False
) -> tuple[Array, Array]:
    """Value of each finest cell, and whether a node gave it.

    A cell that is a node takes its refined value. Otherwise it takes its parent's, if that was refined or handed one
    down in its turn; with ``corrections``, it takes what its parent was *changed by*. All other cells keep the coarse
    value of their own level.
    """
    finest = len(coarse) - 1

    def value(level: int, cell: Cell) -> tuple[float, bool]:
        own = float(coarse[level][cell])
        if level < len(refined) and cell in refined[level] and (hand_down or level == finest):
            return refined[level][cell], True
        if level == 0 or not hand_down:
            return own, False
        parent = (cell[0], cell[1] // 2, cell[2] // 2)
        handed, touched = value(level - 1, parent)
        if not touched:
            return own, False
        return (own + handed - float(coarse[level - 1][parent]) if corrections else handed), True

    values, touched = np.zeros(coarse[-1].shape), np.zeros(coarse[-1].shape, bool)
    for cell in np.ndindex(coarse[-1].shape):
        values[cell], touched[cell] = value(finest, cell)
    return values, touched


def finish(network: Network, coarse: Sequence[Array], logits: Sequence[Mapping[Cell, float]]) -> tuple[Array, Array]:
    """Refined node logits to the RoIs' probabilities, and which cells a node gave."""
    if network.settings.decoder == "label":
        probs = [{cell: sigmoid(value) for cell, value in level.items()} for level in logits]
        return propagate(coarse, probs, network.settings.propagate)
    base = [np.vectorize(coarse_logit, otypes=[float])(level) for level in coarse]
    values, touched = propagate(base, logits, network.settings.propagate, corrections=True)
    return np.where(touched, 1.0 / (1.0 + np.exp(-values)), coarse[-1]), touched


# Between the image and the RoI


def area_average(plane: Array, box: Array, side: int) -> Array:
    """Average a plane ``(H, W)`` over the cells of a box, as RoIAlign does: one sample per pixel or more."""
    x0, y0, x1, y1 = (float(value) for value in box)
    width, height = (x1 - x0) / side, (y1 - y0) / side
    columns, rows = max(math.ceil(width), 1), max(math.ceil(height), 1)
    result = np.zeros((side, side))
    for row, col, i, j in np.ndindex(side, side, rows, columns):
        x, y = x0 + (col + (j + 0.5) / columns) * width, y0 + (row + (i + 0.5) / rows) * height
        result[row, col] += bilinear(plane[None], x - 0.5, y - 0.5)[0] / (rows * columns)
    return result


def paste(
    probs: Array,
    box: Array,
    mask: Array,
    threshold: float = 0.5,
    where: Array | None = None,
    before: Array | None = None,
) -> None:
    """Write one RoI ``(S, S)`` into an image mask ``(H, W)``: pixel by pixel, if its centre is inside of the box.

    With ``before``, only pixels whose probability moved by more than 0.15.
    """
    side = len(probs)
    x0, y0, x1, y1 = (float(value) for value in box)
    for row, col in np.ndindex(mask.shape):
        if not (x0 <= col + 0.5 < x1 and y0 <= row + 0.5 < y1):
            continue
        x, y = (col + 0.5 - x0) / (x1 - x0) * side, (row + 0.5 - y0) / (y1 - y0) * side
        if where is not None and not where[min(int(y), side - 1), min(int(x), side - 1)]:
            continue
        value = bilinear(probs[None], x - 0.5, y - 0.5)[0]
        if before is not None:
            was = bilinear(before[None], x - 0.5, y - 0.5)[0]
            if abs(value - was) <= 0.15:
                continue
        mask[row, col] = value >= threshold


# The method, whole


def refine(scene: Scene, network: Network, coarse: Array, depth: int, threshold: float = 0.5) -> Refined:
    """Refine coarse masks ``(R, S, S)`` at the finest level's side."""
    levels = coarse_levels(coarse, depth)
    found = detect(scene, network, levels, depth, threshold)
    logits = refine_nodes(scene, network, found, levels)
    return Refined(found, logits, *finish(network, levels, logits))
