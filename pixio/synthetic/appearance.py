"""How a rendered scene looks: materials, lights and camera response.

As in real rooms, what a surface belongs to says which patterns are typical of it (a floor is tiled, a wall
has stripes); colors, light and exposure say nothing.

Letters: N rays, n some of them, S points of a light; colors are linear RGB [3, n].
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np

from pixio.synthetic.world import CLASS_NAMES, FACE_CLASSES, Array, World


@dataclass(frozen=True)
class Texture:
    """A two-color pattern on a surface; lengths are in cells, `cell` meters each."""

    pattern: str
    colors: Array  # linear RGB [3, 2]
    cell: float
    turn: tuple[float, float]  # cosine and sine of its rotation
    shift: tuple[float, float]
    duty: float
    grain: float
    gloss: float


@dataclass(frozen=True)
class Light:
    positions: Array  # one point: hard shadows, several: soft ones; meters [S, 3]
    color: Array  # [3]


@dataclass(frozen=True)
class Look:
    """Everything about a scene that is not geometry."""

    textures: tuple[Texture, ...]  # six faces, then the primitives
    noise: Array  # lattice of the value noise [64, 64]
    lights: tuple[Light, ...]
    ambient: float
    fill: Array  # direction and strength of light without shadows [3]
    exposure: float
    tint: Array  # [3]
    sensor_noise: float


# What surfaces of each class are made of: the patterns that are typical of it, the range of their cells in
# meters, and whether they stand upright or lie.
_MATERIALS = {
    "ceiling": (("plain",), (0.5, 0.7), (0.0,)),
    "wall": (("stripes",), (0.3, 0.6), (0.0,)),
    "floor": (("checks", "bricks"), (0.4, 0.8), (0.0, math.pi / 2)),
    "box": (("stripes",), (0.15, 0.3), (math.pi / 2,)),
    "sphere": (("dots",), (0.12, 0.22), (0.0,)),
    "cylinder": (("checks",), (0.12, 0.22), (0.0,)),
    "cone": (("waves",), (0.12, 0.22), (0.0,)),
}


def dress(rng: np.random.Generator, world: World) -> Look:
    """Draw the look; colors come from one distribution, patterns from what is typical of each surface."""
    saturation = rng.uniform(0.05, 0.4)
    shared_walls = rng.random() < 0.6
    kinds = [*(CLASS_NAMES[face] for face in FACE_CLASSES), *(p.kind for p in world.primitives)]
    textures = [_draw_texture(rng, saturation, *_MATERIALS[kind]) for kind in kinds]
    if shared_walls:
        textures[1:4] = [textures[0]] * 3

    lights: list[Light] = []
    count = int(rng.integers(1, 3))
    while len(lights) < count:
        position = rng.uniform((0.15, 0.15, 0.45), (0.85, 0.85, 0.95)) * world.room
        blur = rng.uniform(0.08, 0.25) if rng.random() < 0.6 else 0.0  # meters; 0 is a hard light
        if any(math.dist(position, p.center) < p.reach + 0.35 for p in world.primitives):
            continue
        corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / math.sqrt(3)
        positions = position + blur * corners if blur else position[None]
        warmth = rng.uniform(-0.15, 0.15)
        lights.append(Light(positions, rng.uniform(0.6, 1.4) * np.array([1 + warmth, 1, 1 - warmth])))

    direction = rng.normal(size=3) + np.array([0.0, 0.0, 1.0])  # more often from above than from below
    return Look(
        textures=tuple(textures),
        noise=rng.random((64, 64), np.float32),
        lights=tuple(lights),
        ambient=float(rng.uniform(0.12, 0.35)),
        fill=rng.uniform(0.3, 0.9) * direction / np.linalg.norm(direction),
        exposure=float(rng.uniform(0.35, 0.85)),
        tint=rng.uniform(0.9, 1.1, 3),
        sensor_noise=float(rng.uniform(0.0, 0.004)),
    )


def _draw_texture(
    rng: np.random.Generator,
    saturation: float,
    patterns: tuple[str, ...],
    cells: tuple[float, float],
    turns: tuple[float, ...],
) -> Texture:
    strength = min(1.0, saturation * rng.uniform(0.2, 1.6))
    first = np.array(colorsys.hsv_to_rgb(rng.random(), strength, rng.uniform(0.5, 0.95))) ** 2.2
    second = first * rng.uniform(0.25, 0.55)  # two tones of one color
    colors = [first, second] if rng.random() < 0.5 else [second, first]
    turn = rng.choice(turns)
    return Texture(
        pattern=str(rng.choice(patterns)),
        colors=np.stack(colors, 1).astype(np.float32),
        cell=float(rng.uniform(*cells)),
        turn=(math.cos(turn), math.sin(turn)),
        shift=tuple(rng.uniform(0, 64, 2).tolist()),
        duty=float(rng.uniform(0.3, 0.7)),
        grain=float(rng.uniform(0.0, 0.2)) if rng.random() < 0.3 else 0.0,
        gloss=float(rng.uniform(0.1, 0.5)) if rng.random() < 0.3 else 0.0,
    )


def _step(x: Array, blur: Array) -> Array:
    """0 for x < 0 and 1 for x > 0, as seen through a pixel `blur` cells wide."""
    return np.clip(x / blur + 0.5, 0, 1)


def _off_center(x: Array) -> Array:
    """Distance from the middle of the cell, 0..0.5."""
    return np.abs(x - np.floor(x) - 0.5)


def _value_noise(lattice: Array, u: Array, v: Array) -> Array:
    """Smooth noise in 0..1 with one random value per cell, repeating after 64 cells."""
    left, below = np.floor(u), np.floor(v)
    x, y = u - left, v - below
    x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
    i, j = left.astype(np.int32) & 63, below.astype(np.int32) & 63
    corner = i * 64 + j
    right = ((i + 1) & 63) * 64 + j
    up = ((j + 1) & 63) - j
    flat = lattice.ravel()
    low = flat[corner] + x * (flat[right] - flat[corner])
    high = flat[corner + up] + x * (flat[right + up] - flat[corner + up])
    return low + y * (high - low)


def _plain(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    return np.zeros_like(u)


def _stripes(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    return _step(duty / 2 - _off_center(u), blur)


def _checks(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    a, b = _step(_off_center(u / 2) - 0.25, blur / 2), _step(_off_center(v / 2) - 0.25, blur / 2)
    return a + b - 2 * a * b


def _bricks(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    mortar = 0.03 + 0.06 * duty
    course = np.floor(v)
    joints = np.minimum(0.5 - _off_center(v), 2 * (0.5 - _off_center(u / 2 + 0.5 * (course % 2))))
    return _step(mortar - joints, blur)


def _dots(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    return _step(0.15 + 0.3 * duty - np.hypot(_off_center(u), _off_center(v)), blur)


def _waves(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    return 0.5 + 0.5 * np.sin(2 * math.pi * (u + 1.5 * _value_noise(lattice, 0.5 * u, 0.5 * v)))


# Each maps coordinates on the surface and the width of a pixel there, both in cells [n], to the share of the
# second color, 0..1 [n].
_PATTERNS = {
    "plain": _plain,
    "stripes": _stripes,
    "checks": _checks,
    "bricks": _bricks,
    "dots": _dots,
    "waves": _waves,
}


def paint(texture: Texture, lattice: Array, u: Array, v: Array, pixel: Array) -> Array:
    """Linear RGB [3, n] at surface coordinates in meters [n], seen by pixels `pixel` meters wide [n]."""
    cos, sin = texture.turn
    u, v = (
        (cos * u - sin * v) / texture.cell + texture.shift[0],
        (sin * u + cos * v) / texture.cell + texture.shift[1],
    )
    blur = pixel / texture.cell + np.float32(1e-3)
    share = _PATTERNS[texture.pattern](u, v, blur, texture.duty, lattice)
    fade = np.clip(2 * blur - 0.6, 0, 1)  # a pattern finer than the pixels shows its mean
    share = share + fade * (texture.duty - share)
    first, second = texture.colors[:, :1], texture.colors[:, 1:]
    color = first + share * (second - first)  # [3, n]
    if texture.grain:
        color = color * (1 + texture.grain * (_value_noise(lattice, 3.7 * u, 3.7 * v) - 0.5))
    return color


def develop(rng: np.random.Generator, look: Look, light: Array) -> Array:
    """Exposure, white balance, tone curve and sensor noise: linear light [3, N] to sRGB uint8 [3, N]."""
    exposed = light * (look.exposure / float(light.mean()) * look.tint.astype(np.float32)[:, None])
    toned = (1 - np.exp(-exposed)) ** np.float32(1 / 2.2)
    toned += np.float32(look.sensor_noise) * rng.standard_normal(toned.shape, np.float32)
    return (np.clip(toned, 0, 1) * 255 + 0.5).astype(np.uint8)
