"""What a rendered scene is: room, primitives and camera drawn from a seed, and where rays meet them.

World frame: meters, z up, the room spans [0, width] x [0, length] x [0, height].
Letters: N rays, n some of them, M primitives; vectors are [3, N] = x, y, z.
"""

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

CLASS_NAMES = ("ceiling", "wall", "floor", "box", "sphere", "cylinder", "cone")
KINDS = CLASS_NAMES[3:]
SUPPORTS = ("standing", "floating")
# The image-level class: the kind of more than half of the primitives in sight, and how those are supported
# (on the floor or on another primitive, or in the air).
LABEL_NAMES = tuple(f"{kind}-{support}" for kind in KINDS for support in SUPPORTS)
FACE_CLASSES = (1, 1, 1, 1, 2, 0)  # room faces x=0, x=width, y=0, y=length, z=0, z=height
FACES = len(FACE_CLASSES)

_CAMERA_CLEARANCE = 0.3  # meters to every wall and primitive: keeps all depths above 0.1 m
_PROBE = 24  # side of the coarse grid of rays that decides whether a view shows what its label says


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with square pixels.

    Attributes:
        position: meters [3].
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
            rows: vertical positions in pixels from the upper border [N]; the center of the first row is 0.5.
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
        center: of its bounding box, meters [3].
        half: half of its extents before the rotation, meters [3]; the radius twice where it is round.
        yaw: rotation about the vertical, radians.
    """

    kind: str
    center: Array
    half: Array
    yaw: float

    @property
    def footprint(self) -> float:
        """Radius of the vertical cylinder that contains it, meters."""
        return float(np.hypot(*self.half[:2])) if self.kind == "box" else float(self.half[0])

    @property
    def reach(self) -> float:
        """Radius of a sphere about the center that contains it, meters."""
        return float(self.half[0]) if self.kind == "sphere" else math.hypot(self.footprint, self.half[2])

    def to_local(self, vectors: Array) -> Array:
        """Rotate world vectors [3, ...] into the primitive's frame."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        x, y, z = vectors
        return np.stack([cos * x + sin * y, cos * y - sin * x, z])

    def to_world(self, vectors: Array) -> Array:
        """Rotate vectors of the primitive's frame [3, ...] into the world."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        x, y, z = vectors
        return np.stack([cos * x - sin * y, cos * y + sin * x, z])


@dataclass(frozen=True)
class World:
    """The geometry behind a scene: room extents in meters [3], primitives, camera and label."""

    room: Array
    primitives: tuple[Primitive, ...]
    camera: Camera
    label: int


def label_of(seed: int) -> int:
    """Image-level class of a seed: eight consecutive seeds hold each label once."""
    return seed % len(LABEL_NAMES)


def compose(seed: int) -> World:
    """Draw the geometry of a seed, again and again until the view shows what the label says.

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
    """Place 3-8 primitives, most of them of the kind and support given; None where they do not fit."""
    count = int(rng.integers(3, 9))
    same = count // 2 + 1
    others = [other for other in KINDS if other != kind]
    kinds = [kind] * same + [others[i] for i in rng.integers(len(others), size=count - same)]
    supports = [support] * same + [SUPPORTS[i] for i in rng.integers(len(SUPPORTS), size=count - same)]
    heart = rng.uniform(0.25, 0.75, 2) * room[:2]
    spread = rng.uniform(0.5, 0.9) + 0.1 * count

    placed: list[Primitive] = []
    bare: list[Primitive] = []  # flat tops that carry nothing yet
    for i in rng.permutation(count):
        for _ in range(12):
            radius, tall = rng.uniform((0.14, 0.14), (0.42, 0.55))
            half = np.array([radius, radius * (rng.uniform(0.5, 1.2) if kinds[i] == "box" else 1), tall])
            if kinds[i] == "sphere":
                half[2] = radius
            if supports[i] == "standing" and bare and rng.random() < 0.4:
                half *= min(1.0, 0.9 * min(bare[-1].half[:2]) / radius)
                below = bare[-1]
                center = below.center + np.array([0, 0, below.half[2] + half[2]])
            else:
                highest = room[2] - half[2]
                if supports[i] == "standing":
                    level = half[2]
                elif rng.random() < 0.25:
                    level = highest  # hangs from the ceiling
                else:
                    level = rng.uniform(min(half[2] + 0.4, highest), highest)
                center = np.array([*(heart + rng.normal(0, spread / 2, 2)), level])
                below = None
            candidate = Primitive(kinds[i], center, half, float(rng.uniform(0, 2 * math.pi)))
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
    low, high = candidate.center - candidate.half, candidate.center + candidate.half
    margin = candidate.footprint + 0.02
    inside = (margin < candidate.center[:2]).all() and (candidate.center[:2] < room[:2] - margin).all()
    if not inside or low[2] < -1e-6 or high[2] > room[2] + 1e-6:
        return False
    for other in others:
        reach = candidate.footprint + other.footprint + 0.02
        beside = math.dist(candidate.center[:2], other.center[:2]) > reach
        above = abs(candidate.center[2] - other.center[2]) > candidate.half[2] + other.half[2] + 0.02
        if not beside and not above:
            return False
    return True


def _aim(rng: np.random.Generator, room: Array, primitives: tuple[Primitive, ...]) -> Camera | None:
    """Draw a camera that looks somewhere near the primitives; None where it would touch one."""
    margin = _CAMERA_CLEARANCE + 0.05
    position = rng.uniform(margin, room - margin)
    position[2] = room[2] * rng.uniform(0.35, 0.7)  # held by somebody standing or sitting
    if any(math.dist(position, p.center) < p.reach + _CAMERA_CLEARANCE for p in primitives):
        return None
    target = np.mean([p.center for p in primitives], 0) + rng.normal(0, (0.4, 0.4, 0.3))
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
    _, surface = trace(room, primitives, camera.position, camera.rays(rows, columns, _PROBE, _PROBE))
    pixels = np.bincount(surface, minlength=FACES + len(primitives))[FACES:]  # [M]
    seen = [p.kind for p, count in zip(primitives, pixels, strict=True) if count >= 4]
    share = pixels.sum() / _PROBE**2
    return len(seen) >= 3 and 2 * seen.count(kind) > len(seen) and 0.12 < share < 0.65


def trace(room: Array, primitives: tuple[Primitive, ...], origin: Array, rays: Array) -> tuple[Array, Array]:
    """Follow rays from one point to the first surface.

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
    return nearest(primitives, origin, rays, walls[axis, lane], surface)


def nearest(
    primitives: tuple[Primitive, ...], origin: Array, rays: Array, limit: Array, surface: Array
) -> tuple[Array, Array]:
    """Shorten `limit` [N] and rename `surface` [N], both in place, wherever a primitive is hit earlier."""
    to_centers = np.stack([p.center - origin for p in primitives])  # [M, 3]
    along = to_centers.astype(np.float32) @ rays  # [M, N]
    lengths = np.einsum("dn,dn->n", rays, rays)
    for i, primitive in enumerate(primitives):
        # Only rays that meet a slightly enlarged bounding sphere: |c|^2 - (c.d)^2 / d^2 <= r^2.
        gap = float(to_centers[i] @ to_centers[i]) - (1.02 * primitive.reach) ** 2
        near = np.flatnonzero((along[i] > 0) & (along[i] * along[i] >= gap * lengths))
        local = primitive.to_local(rays[:, near])
        hit = _HITS[primitive.kind](primitive, primitive.to_local(-to_centers[i]), local)
        closer = np.flatnonzero(hit < limit[near])
        limit[near[closer]] = hit[closer]
        surface[near[closer]] = FACES + i
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
