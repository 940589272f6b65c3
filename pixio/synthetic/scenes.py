"""Endless labelled indoor-like scenes from a small ray caster: image, depth, classes, image-level class.

A scene is a pure function of its seed. What it *is* (room, primitives, camera) and how it *looks* (colours,
textures, lights, noise) come from two independent random streams: colour and texture say nothing about class
or depth, only context does.

World frame: metres, z up, the room spans [0, width] x [0, length] x [0, height].
Letters: N rays, n some of them, M primitives, H, W image size; vectors are [3, N] = x, y, z.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

VERSION = 2  # raised whenever a seed comes to look different
CLASS_NAMES = ("ceiling", "wall", "floor", "box", "sphere", "cylinder", "cone")
KINDS = CLASS_NAMES[3:]
SUPPORTS = ("standing", "floating")
# The image-level class: the kind of more than half of the primitives in sight, and how those are supported
# (on the floor or on another primitive, or in the air).
LABEL_NAMES = tuple(f"{kind}-{support}" for kind in KINDS for support in SUPPORTS)

_FACE_CLASSES = (1, 1, 1, 1, 2, 0)  # room faces x=0, x=width, y=0, y=length, z=0, z=height
_FACES = len(_FACE_CLASSES)
_CAMERA_CLEARANCE = 0.3  # metres to every wall and primitive: keeps all depths above 0.1 m
_PROBE = 24  # side of the coarse grid of rays that decides whether a view shows what its label says


@dataclass(frozen=True)
class Scene:
    """One rendered view.

    Attributes:
        image: uint8 [H, W, 3], sRGB.
        depth: float32 [H, W], metres along the optical axis (as in NYUv2 and KITTI), within 0.1..10.
        semantics: uint8 [H, W], index into `CLASS_NAMES`.
        label: index into `LABEL_NAMES`.
    """

    image: Array
    depth: Array
    semantics: Array
    label: int


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with square pixels.

    Attributes:
        position: metres [3].
        axes: rows are the unit vectors right, up, forward in the world frame [3, 3].
        field_of_view: radians over the longer image side.
    """

    position: Array
    axes: Array
    field_of_view: float

    def focal(self, height: int, width: int) -> float:
        """Focal length in pixels."""
        return 0.5 * max(height, width) / math.tan(self.field_of_view / 2)

    def rays(self, rows: Array, columns: Array, height: int, width: int) -> Array:
        """Directions through image positions; 1 long along the optical axis, so that ray lengths are depths.

        Args:
            rows: vertical positions in pixels from the upper border [N]; the centre of the first row is 0.5.
            columns: horizontal positions in pixels from the left border [N].
            height, width: image size in pixels.

        Returns:
            float32 [3, N], world frame.
        """
        focal = self.focal(height, width)
        right, up, forward = self.axes.astype(np.float32)
        across = ((columns - width / 2) / focal).astype(np.float32)
        above = ((height / 2 - rows) / focal).astype(np.float32)
        return right[:, None] * across + up[:, None] * above + forward[:, None]  # [3, N]


@dataclass(frozen=True)
class Primitive:
    """A convex solid whose axis is vertical.

    Attributes:
        kind: one of `KINDS`; a cone points up.
        centre: of its bounding box, metres [3].
        half: half of its extents before the rotation, metres [3]; the radius twice where it is round.
        yaw: rotation about the vertical, radians.
    """

    kind: str
    centre: Array
    half: Array
    yaw: float

    @property
    def footprint(self) -> float:
        """Radius of the vertical cylinder that contains it, metres."""
        return float(np.hypot(*self.half[:2])) if self.kind == "box" else float(self.half[0])

    @property
    def reach(self) -> float:
        """Radius of a sphere about the centre that contains it, metres."""
        return float(self.half[0]) if self.kind == "sphere" else math.hypot(self.footprint, self.half[2])

    def to_local(self, vectors: Array) -> Array:
        """Rotates world vectors [3, ...] into the primitive's frame."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        x, y, z = vectors
        return np.stack([cos * x + sin * y, cos * y - sin * x, z])

    def to_world(self, vectors: Array) -> Array:
        """Rotates vectors of the primitive's frame [3, ...] into the world."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        x, y, z = vectors
        return np.stack([cos * x - sin * y, cos * y + sin * x, z])


@dataclass(frozen=True)
class World:
    """The geometry behind a scene: room extents in metres [3], primitives, camera and label."""

    room: Array
    primitives: tuple[Primitive, ...]
    camera: Camera
    label: int


@dataclass(frozen=True)
class _Texture:
    """A two-colour pattern on a surface; lengths are in cells, `cell` metres each."""

    pattern: str
    colours: Array  # linear RGB [3, 2]
    cell: float
    turn: tuple[float, float]  # cosine and sine of its rotation
    shift: tuple[float, float]
    duty: float
    grain: float
    gloss: float


@dataclass(frozen=True)
class _Light:
    positions: Array  # one point: hard shadows, several: soft ones; metres [S, 3]
    colour: Array  # [3]


@dataclass(frozen=True)
class _Look:
    """Everything about a scene that is not geometry."""

    textures: tuple[_Texture, ...]  # six faces, then the primitives
    noise: Array  # lattice of the value noise [64, 64]
    lights: tuple[_Light, ...]
    ambient: float
    fill: Array  # direction and strength of light without shadows [3]
    exposure: float
    tint: Array  # [3]
    sensor_noise: float


def label_of(seed: int) -> int:
    """Image-level class of a seed: eight consecutive seeds hold each label once."""
    return seed % len(LABEL_NAMES)


def render(seed: int, size: int | tuple[int, int] = 128) -> Scene:
    """Renders the scene of a seed; another size shows the same scene.

    What the label says is visible in a square image; another aspect crops the square at its shorter sides.

    Args:
        seed: any integer >= 0.
        size: side of a square image, or (height, width), pixels.

    Returns:
        The scene; depth and classes are those of pixel centres, colour at outlines is a mean over the pixel.

    Raises:
        ValueError: for a negative seed or a size below one pixel.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size must be at least 1 pixel, got {height} x {width} (height x width)")
    world = compose(seed)
    appearance = np.random.default_rng([1, seed])
    look = _dress(appearance, world)

    rows, columns = (grid.ravel() + 0.5 for grid in np.mgrid[:height, :width])  # [N]
    rays = world.camera.rays(rows, columns, height, width)
    view = _View(world, look, 1 / world.camera.focal(height, width))
    light, depth, surface, normals, lit = view.shade(rays)

    outline = np.flatnonzero(_outline(surface, normals, lit, height, width))
    offsets = np.array([[-0.25, -0.25], [-0.25, 0.25], [0.25, -0.25], [0.25, 0.25]])
    inner_rows = (rows[outline, None] + offsets[:, 0]).ravel()  # [N, 4] -> [4N]
    inner_columns = (columns[outline, None] + offsets[:, 1]).ravel()
    finer = view.shade(world.camera.rays(inner_rows, inner_columns, height, width))[0]
    light[:, outline] = finer.reshape(3, -1, 4).mean(2)

    classes = np.array([*_FACE_CLASSES, *(CLASS_NAMES.index(p.kind) for p in world.primitives)], np.uint8)
    return Scene(
        image=np.ascontiguousarray(_develop(appearance, look, light).T).reshape(height, width, 3),
        depth=depth.reshape(height, width),
        semantics=classes[surface].reshape(height, width),
        label=world.label,
    )


# --------------------------------------------------------------------------- what the scene is


def compose(seed: int) -> World:
    """Draws the geometry of a seed, again and again until the view shows what the label says.

    Args:
        seed: any integer >= 0.

    Raises:
        ValueError: for a negative seed.
    """
    if seed < 0:
        raise ValueError(f"a scene's seed must be an integer >= 0, got {seed}")
    label = label_of(seed)
    kind, support = divmod(label, len(SUPPORTS))
    rng = np.random.default_rng([0, seed])
    while True:
        room = rng.uniform((3.0, 3.0, 2.2), (6.5, 6.5, 3.4))
        primitives = _furnish(rng, room, KINDS[kind], SUPPORTS[support])
        if primitives is None:
            continue
        for _ in range(4):
            camera = _aim(rng, room, primitives)
            if camera is not None and _shows(room, primitives, camera, KINDS[kind]):
                return World(room, primitives, camera, label)


def _furnish(rng: np.random.Generator, room: Array, kind: str, support: str) -> tuple[Primitive, ...] | None:
    """Places 3-8 primitives, most of them of the kind and support given; None where they do not fit."""
    count = int(rng.integers(3, 9))
    same = count // 2 + 1
    others = [other for other in KINDS if other != kind]
    kinds = [kind] * same + [others[i] for i in rng.integers(len(others), size=count - same)]
    supports = [support] * same + [SUPPORTS[i] for i in rng.integers(len(SUPPORTS), size=count - same)]
    heart = rng.uniform(0.25, 0.75, 2) * room[:2]
    spread = rng.uniform(0.5, 0.9) + 0.1 * count

    placed: list[Primitive] = []
    bare = []  # flat tops that carry nothing yet
    for i in rng.permutation(count):
        for _ in range(12):
            radius, tall = rng.uniform((0.14, 0.14), (0.42, 0.55))
            half = np.array([radius, radius * (rng.uniform(0.5, 1.2) if kinds[i] == "box" else 1), tall])
            if kinds[i] == "sphere":
                half[2] = radius
            if supports[i] == "standing" and bare and rng.random() < 0.4:
                half *= min(1.0, 0.9 * min(bare[-1].half[:2]) / radius)
                below = bare[-1]
                centre = below.centre + np.array([0, 0, below.half[2] + half[2]])
            else:
                highest = room[2] - half[2]
                if supports[i] == "standing":
                    level = half[2]
                elif rng.random() < 0.25:
                    level = highest  # hangs from the ceiling
                else:
                    level = rng.uniform(min(half[2] + 0.4, highest), highest)
                centre = np.array([*(heart + rng.normal(0, spread / 2, 2)), level])
                below = None
            candidate = Primitive(kinds[i], centre, half, float(rng.uniform(0, 2 * math.pi)))
            if _fits(candidate, room, [p for p in placed if p is not below]):
                placed.append(candidate)
                bare = [p for p in bare if p is not below]
                if supports[i] == "standing" and kinds[i] in ("box", "cylinder"):
                    bare.append(candidate)
                break
        else:
            return None
    return tuple(placed)


def _fits(candidate: Primitive, room: Array, others: list[Primitive]) -> bool:
    """Whether a primitive stays in the room and apart from others, judged by upright bounding cylinders."""
    low, high = candidate.centre - candidate.half, candidate.centre + candidate.half
    margin = candidate.footprint + 0.02
    inside = (margin < candidate.centre[:2]).all() and (candidate.centre[:2] < room[:2] - margin).all()
    if not inside or low[2] < -1e-6 or high[2] > room[2] + 1e-6:
        return False
    for other in others:
        reach = candidate.footprint + other.footprint + 0.02
        beside = math.dist(candidate.centre[:2], other.centre[:2]) > reach
        above = abs(candidate.centre[2] - other.centre[2]) > candidate.half[2] + other.half[2] + 0.02
        if not beside and not above:
            return False
    return True


def _aim(rng: np.random.Generator, room: Array, primitives: tuple[Primitive, ...]) -> Camera | None:
    """Draws a camera that looks somewhere near the primitives; None where it would touch one."""
    margin = _CAMERA_CLEARANCE + 0.05
    position = rng.uniform(margin, room - margin)
    position[2] = room[2] * rng.uniform(0.35, 0.7)  # held by somebody standing or sitting
    if any(math.dist(position, p.centre) < p.reach + _CAMERA_CLEARANCE for p in primitives):
        return None
    target = np.mean([p.centre for p in primitives], 0) + rng.normal(0, (0.4, 0.4, 0.3))
    forward = target - position
    forward[2] *= 0.6  # nearer the horizontal than the straight look at them
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    roll = rng.normal(0, math.radians(4))
    right, up = math.cos(roll) * right + math.sin(roll) * up, math.cos(roll) * up - math.sin(roll) * right
    return Camera(position, np.stack([right, up, forward]), math.radians(rng.uniform(50, 85)))


def _shows(room: Array, primitives: tuple[Primitive, ...], camera: Camera, kind: str) -> bool:
    """Whether at least three primitives, most of them of the kind given, are seen at a sensible size."""
    rows, columns = (grid.ravel() + 0.5 for grid in np.mgrid[:_PROBE, :_PROBE])
    _, surface = _trace(room, primitives, camera.position, camera.rays(rows, columns, _PROBE, _PROBE))
    pixels = np.bincount(surface, minlength=_FACES + len(primitives))[_FACES:]  # [M]
    seen = [p.kind for p, count in zip(primitives, pixels, strict=True) if count >= 4]
    share = pixels.sum() / _PROBE**2
    return len(seen) >= 3 and 2 * seen.count(kind) > len(seen) and 0.12 < share < 0.65


# --------------------------------------------------------------------------- where rays go


def _trace(room: Array, primitives: tuple[Primitive, ...], origin: Array, rays: Array) -> tuple[Array, Array]:
    """Follows rays from one point to the first surface.

    Returns:
        Distance in ray lengths, float32 [N], and the surface, int [N]: 0-5 the room's faces, 6.. primitives.
    """
    start = origin.astype(np.float32)[:, None]
    with np.errstate(divide="ignore"):
        walls = (np.where(rays > 0, room.astype(np.float32)[:, None], 0) - start) / rays  # [3, N]
    walls[rays == 0] = np.inf
    axis = walls.argmin(0)
    lane = np.arange(rays.shape[1])
    surface = 2 * axis + (rays[axis, lane] > 0)
    return _nearest(primitives, origin, rays, walls[axis, lane], surface)


def _nearest(
    primitives: tuple[Primitive, ...], origin: Array, rays: Array, limit: Array, surface: Array
) -> tuple[Array, Array]:
    """Shortens `limit` [N] and renames `surface` [N], both in place, wherever a primitive is hit earlier."""
    to_centres = np.stack([p.centre - origin for p in primitives])  # [M, 3]
    along = to_centres.astype(np.float32) @ rays  # [M, N]
    lengths = np.einsum("dn,dn->n", rays, rays)
    for i, primitive in enumerate(primitives):
        # Only rays that meet a slightly enlarged bounding sphere: |c|^2 - (c.d)^2 / d^2 <= r^2.
        gap = float(to_centres[i] @ to_centres[i]) - (1.02 * primitive.reach) ** 2
        near = np.flatnonzero((along[i] > 0) & (along[i] * along[i] >= gap * lengths))
        local = primitive.to_local(rays[:, near])
        hit = _HITS[primitive.kind](primitive, primitive.to_local(-to_centres[i]), local)
        closer = np.flatnonzero(hit < limit[near])
        limit[near[closer]] = hit[closer]
        surface[near[closer]] = _FACES + i
    return limit, surface


def _hit_box(primitive: Primitive, start: Array, rays: Array) -> Array:
    """Where rays from outside enter a box, in ray lengths [n], infinite for a miss; in the box's frame."""
    with np.errstate(divide="ignore"):
        inverse = 1 / rays
    low = (-primitive.half - start).astype(np.float32)[:, None] * inverse
    high = (primitive.half - start).astype(np.float32)[:, None] * inverse
    enter = np.minimum(low, high).max(0)
    leave = np.maximum(low, high).min(0)
    return np.where((enter <= leave) & (enter > 0), enter, np.inf)


def _hit_round(primitive: Primitive, start: Array, rays: Array) -> Array:
    """The same for sphere, cylinder and cone.

    Each is a quadric x^2 + y^2 + bend (z - middle)^2 = level, cut off at both ends.
    """
    radius, half_height = float(primitive.half[0]), float(primitive.half[2])
    bend, middle, level = {
        "sphere": (1.0, 0.0, radius**2),
        "cylinder": (0.0, 0.0, radius**2),
        "cone": (-((radius / (2 * half_height)) ** 2), half_height, 0.0),
    }[primitive.kind]
    ox, oy, oz = (float(value) for value in start)
    dx, dy, dz = rays
    with np.errstate(divide="ignore", invalid="ignore"):
        a = dx * dx + dy * dy + bend * (dz * dz)
        b = ox * dx + oy * dy + (bend * (oz - middle)) * dz
        c = ox**2 + oy**2 + bend * (oz - middle) ** 2 - level
        inner = b * b - a * c
        q = -b - np.copysign(np.sqrt(inner), b)  # the root without cancellation; NaN (a miss) where inner < 0
        best = np.full(dx.shape, np.inf, np.float32)
        end = 1.0001 * half_height  # a hair longer, so that no ray slips through between side and cap
        for t in (q / a, c / q):
            best = np.where((t > 0) & (t < best) & (np.abs(oz + t * dz) <= end), t, best)
        if abs(oz) > half_height and (primitive.kind == "cylinder" or (primitive.kind == "cone" and oz < 0)):
            t = (math.copysign(half_height, oz) - oz) / dz  # the cap on the side of the origin
            inside = (ox + t * dx) ** 2 + (oy + t * dy) ** 2 <= radius**2
            best = np.where((t > 0) & (t < best) & inside, t, best)
    return best


_HITS = {"box": _hit_box, "sphere": _hit_round, "cylinder": _hit_round, "cone": _hit_round}


# --------------------------------------------------------------------------- what the scene looks like


def _dress(rng: np.random.Generator, world: World) -> _Look:
    """Draws the look; every surface's texture comes from one distribution, whatever the surface is."""
    saturation = rng.uniform(0.15, 0.75)
    shared_walls = rng.random() < 0.6
    textures = [_draw_texture(rng, saturation) for _ in range(_FACES + len(world.primitives))]
    if shared_walls:
        textures[1:4] = [textures[0]] * 3

    lights: list[_Light] = []
    count = int(rng.integers(1, 3))
    while len(lights) < count:
        position = rng.uniform((0.15, 0.15, 0.45), (0.85, 0.85, 0.95)) * world.room
        blur = rng.uniform(0.08, 0.25) if rng.random() < 0.6 else 0.0  # metres; 0 is a hard light
        if any(math.dist(position, p.centre) < p.reach + 0.35 for p in world.primitives):
            continue
        corners = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / math.sqrt(3)
        positions = position + blur * corners if blur else position[None]
        warmth = rng.uniform(-0.15, 0.15)
        lights.append(_Light(positions, rng.uniform(0.6, 1.4) * np.array([1 + warmth, 1, 1 - warmth])))

    direction = rng.normal(size=3) + np.array([0.0, 0.0, 1.0])  # more often from above than from below
    return _Look(
        textures=tuple(textures),
        noise=rng.random((64, 64), np.float32),
        lights=tuple(lights),
        ambient=float(rng.uniform(0.12, 0.35)),
        fill=rng.uniform(0.3, 0.9) * direction / np.linalg.norm(direction),
        exposure=float(rng.uniform(0.35, 0.85)),
        tint=rng.uniform(0.9, 1.1, 3),
        sensor_noise=float(rng.uniform(0.0, 0.004)),
    )


def _draw_texture(rng: np.random.Generator, saturation: float) -> _Texture:
    colours = []
    for _ in range(2):
        strength = min(1.0, saturation * rng.uniform(0.2, 1.6))
        colour = colorsys.hsv_to_rgb(rng.random(), strength, rng.uniform(0.2, 0.95))
        colours.append(np.array(colour) ** 2.2)
    if rng.random() < 0.4:  # two tones of one colour
        colours[1] = colours[0] * rng.uniform(0.35, 0.8)
    colours[1] = colours[0] + rng.uniform(0.1, 0.6) * (
        colours[1] - colours[0]
    )  # quieter than light and shadow
    turn = rng.choice([0.0, math.pi / 2, rng.uniform(0, math.pi)])
    return _Texture(
        pattern=str(rng.choice(list(_PATTERNS))),
        colours=np.stack(colours, 1).astype(np.float32),
        cell=float(np.exp(rng.uniform(math.log(0.06), math.log(0.7)))),
        turn=(math.cos(turn), math.sin(turn)),
        shift=tuple(rng.uniform(0, 64, 2).tolist()),
        duty=float(rng.uniform(0.25, 0.75)),
        grain=float(rng.uniform(0.0, 0.3)) if rng.random() < 0.5 else 0.0,
        gloss=float(rng.uniform(0.1, 0.5)) if rng.random() < 0.4 else 0.0,
    )


def _step(x: Array, blur: Array) -> Array:
    """0 for x < 0 and 1 for x > 0, as seen through a pixel `blur` cells wide."""
    return np.clip(x / blur + 0.5, 0, 1)


def _off_centre(x: Array) -> Array:
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
    return _step(duty / 2 - _off_centre(u), blur)


def _checks(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    a, b = _step(_off_centre(u / 2) - 0.25, blur / 2), _step(_off_centre(v / 2) - 0.25, blur / 2)
    return a + b - 2 * a * b


def _bricks(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    mortar = 0.03 + 0.06 * duty
    course = np.floor(v)
    joints = np.minimum(0.5 - _off_centre(v), 2 * (0.5 - _off_centre(u / 2 + 0.5 * (course % 2))))
    return _step(mortar - joints, blur)


def _dots(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    return _step(0.15 + 0.3 * duty - np.hypot(_off_centre(u), _off_centre(v)), blur)


def _clouds(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    rough = 0.65 * _value_noise(lattice, u, v) + 0.35 * _value_noise(lattice, 2.3 * u, 2.3 * v)
    return np.clip(2.2 * (rough - 0.5) + duty, 0, 1)


def _waves(u: Array, v: Array, blur: Array, duty: float, lattice: Array) -> Array:
    return 0.5 + 0.5 * np.sin(2 * math.pi * (u + 1.5 * _value_noise(lattice, 0.5 * u, 0.5 * v)))


# Each maps coordinates on the surface and the width of a pixel there, both in cells [n], to the share of the
# second colour, 0..1 [n].
_PATTERNS = {
    "plain": _plain,
    "stripes": _stripes,
    "checks": _checks,
    "bricks": _bricks,
    "dots": _dots,
    "clouds": _clouds,
    "waves": _waves,
}


def _paint(texture: _Texture, lattice: Array, u: Array, v: Array, pixel: Array) -> Array:
    """Linear RGB [3, n] at surface coordinates in metres [n], seen by pixels `pixel` metres wide [n]."""
    cos, sin = texture.turn
    u, v = (
        (cos * u - sin * v) / texture.cell + texture.shift[0],
        (sin * u + cos * v) / texture.cell + texture.shift[1],
    )
    blur = pixel / texture.cell + np.float32(1e-3)
    share = _PATTERNS[texture.pattern](u, v, blur, texture.duty, lattice)
    fade = np.clip(2 * blur - 0.6, 0, 1)  # a pattern finer than the pixels shows its mean
    share = share + fade * (texture.duty - share)
    first, second = texture.colours[:, :1], texture.colours[:, 1:]
    colour = first + share * (second - first)  # [3, n]
    if texture.grain:
        colour = colour * (1 + texture.grain * (_value_noise(lattice, 3.7 * u, 3.7 * v) - 0.5))
    return colour


@dataclass(frozen=True)
class _View:
    """Shades rays from the camera; `pixel` is the width of a pixel at one metre, metres."""

    world: World
    look: _Look
    pixel: float

    def shade(self, rays: Array) -> tuple[Array, Array, Array, Array, Array]:
        """Follows rays [3, N] and lights what they meet.

        Returns:
            Light [3, N], depth [N], surface [N] (as in `_trace`), unit normals [3, N], and how many lights
            are in sight [N].
        """
        room, primitives, camera = self.world.room, self.world.primitives, self.world.camera
        depth, surface = _trace(room, primitives, camera.position, rays)
        points = camera.position.astype(np.float32)[:, None] + depth * rays
        towards = -rays / np.sqrt(np.einsum("dn,dn->n", rays, rays))

        normals = np.empty_like(points)
        albedo = np.empty_like(points)
        gloss = np.array([texture.gloss for texture in self.look.textures], np.float32)[surface]
        for i in np.flatnonzero(np.bincount(surface)):
            here = np.flatnonzero(surface == i)
            if i < _FACES:
                facing, u, v = _face(i, points[:, here])
            else:
                facing, u, v = _skin(primitives[i - _FACES], points[:, here], camera.position)
            normals[:, here] = facing
            slant = np.maximum(np.einsum("dn,dn->n", facing, towards[:, here]), 0.2)
            albedo[:, here] = _paint(
                self.look.textures[i], self.look.noise, u, v, self.pixel * depth[here] / slant
            )

        fill = 1 + np.einsum("d,dn->n", self.look.fill.astype(np.float32), normals)
        shine = np.zeros_like(points)
        lit = np.zeros_like(depth)
        received = np.repeat(self.look.ambient * fill[None], 3, 0)
        for light in self.look.lights:
            centre = light.positions.mean(0).astype(np.float32)[:, None]
            beam = centre - points
            squared = np.einsum("dn,dn->n", beam, beam)
            beam /= np.sqrt(squared)
            slope = np.einsum("dn,dn->n", normals, beam)
            seen = np.zeros_like(depth)
            front = np.flatnonzero(slope > 0)
            for position in light.positions:
                seen[front] += self._reaches(position, points[:, front])
            seen /= len(light.positions)
            lit += seen
            power = seen / (1 + squared / 6)  # softer than the inverse square, so that corners stay readable
            colour = light.colour.astype(np.float32)[:, None]
            received += colour * (power * np.maximum(slope, 0))
            glossy = np.flatnonzero(gloss * power > 0)
            halfway = beam[:, glossy] + towards[:, glossy]
            halfway /= np.sqrt(np.einsum("dn,dn->n", halfway, halfway))
            lobe = np.maximum(np.einsum("dn,dn->n", normals[:, glossy], halfway), 0) ** 32
            shine[:, glossy] += colour * (gloss[glossy] * power[glossy] * lobe)
        return albedo * received + shine, depth, surface, normals, lit

    def _reaches(self, position: Array, points: Array) -> Array:
        """Whether light from a position [3] arrives at points [3, n]; bool [n]."""
        rays = points - position.astype(np.float32)[:, None]
        limit = np.full(rays.shape[1], 0.998, np.float32)  # < 1: a surface does not shade itself
        surface = np.full(rays.shape[1], -1)
        return _nearest(self.world.primitives, position, rays, limit, surface)[1] < 0


def _face(face: int, points: Array) -> tuple[Array, Array, Array]:
    """Inward normal [3, 1] and surface coordinates in metres [n], [n] of a face of the room."""
    axis = face // 2
    normal = np.zeros((3, 1), np.float32)
    normal[axis] = 1 - 2 * (face % 2)
    return normal, points[1 if axis == 0 else 0], points[1 if axis == 2 else 2]


def _skin(primitive: Primitive, points: Array, camera: Array) -> tuple[Array, Array, Array]:
    """Outward unit normals [3, n] and surface coordinates in m [n], [n] of points [3, n] on a primitive."""
    local = primitive.to_local(points - primitive.centre.astype(np.float32)[:, None])
    radius, half_height = float(primitive.half[0]), float(primitive.half[2])
    x, y, z = local
    normals = np.zeros_like(local)
    if primitive.kind == "box":
        half = primitive.half.astype(np.float32)[:, None]
        axis = (np.abs(local) - half).argmax(0)
        lane = np.arange(len(x))
        normals[axis, lane] = np.sign(local[axis, lane])
        return primitive.to_world(normals), np.where(axis == 0, y, x), np.where(axis == 2, y, z)

    # Angles count from the camera, which puts the seam of the texture on the far side.
    eye = primitive.to_local(camera - primitive.centre)
    bearing = math.atan2(eye[1], eye[0])
    turned_x = math.cos(bearing) * x + math.sin(bearing) * y
    turned_y = math.cos(bearing) * y - math.sin(bearing) * x
    u = radius * np.arctan2(turned_y, turned_x)
    if primitive.kind == "sphere":
        return primitive.to_world(local / radius), u, radius * np.arcsin(np.clip(z / radius, -1, 1))
    ring = np.maximum(np.hypot(x, y), np.float32(1e-6))
    slope = radius / (2 * half_height) if primitive.kind == "cone" else 0.0
    beyond_side = ring - (slope * (half_height - z) if primitive.kind == "cone" else radius)
    beyond_cap = np.abs(z) - half_height if primitive.kind == "cylinder" else -half_height - z
    cap = beyond_cap > beyond_side
    length = math.hypot(1, slope)
    normals[0] = np.where(cap, 0, x / ring / length)
    normals[1] = np.where(cap, 0, y / ring / length)
    normals[2] = np.where(cap, np.sign(z), slope / length)
    return primitive.to_world(normals), np.where(cap, x, u), np.where(cap, y, z)


def _outline(surface: Array, normals: Array, lit: Array, height: int, width: int) -> Array:
    """Marks pixels beside a change of surface, facet or shadow; bool [N]."""
    surface, lit = surface.reshape(height, width), lit.reshape(height, width)
    normals = normals.reshape(3, height, width)
    marked = np.zeros((height, width), bool)
    for one, two in (
        (np.s_[..., :-1, :], np.s_[..., 1:, :]),
        (np.s_[..., :, :-1], np.s_[..., :, 1:]),
    ):
        change = (surface[one] != surface[two]) | (np.abs(lit[one] - lit[two]) > 0.2)
        change |= np.einsum("dhw,dhw->hw", normals[one], normals[two]) < 0.8
        marked[one] |= change
        marked[two] |= change
    return marked.ravel()


def _develop(rng: np.random.Generator, look: _Look, light: Array) -> Array:
    """Exposure, white balance, tone curve and sensor noise: linear light [3, N] to sRGB uint8 [3, N]."""
    exposed = light * (look.exposure / float(light.mean()) * look.tint.astype(np.float32)[:, None])
    toned = (1 - np.exp(-exposed)) ** np.float32(1 / 2.2)
    toned += np.float32(look.sensor_noise) * rng.standard_normal(toned.shape, np.float32)
    return (np.clip(toned, 0, 1) * 255 + 0.5).astype(np.uint8)
