"""Endless labeled indoor-like scenes from a small ray caster: image, depth, classes, image-level class.

A scene is a pure function of its seed. What it *is* (`world`) and how it *looks* (`appearance`) come from two
independent random streams: colors and light say nothing about class or depth; patterns are typical of what
they are on, as in real rooms.
Letters: N rays, n some of them, H, W image size; vectors are [3, N] = x, y, z.
"""

import math
from dataclasses import dataclass

import numpy as np

from pixio.synthetic.appearance import Look, develop, dress, paint
from pixio.synthetic.world import (
    CLASS_NAMES,
    FACE_CLASSES,
    FACES,
    LABEL_NAMES,
    Array,
    Primitive,
    World,
    compose,
    label_of,
    nearest,
    trace,
)

__all__ = ["CLASS_NAMES", "LABEL_NAMES", "VERSION", "Scene", "label_of", "render"]

VERSION = 3  # raised whenever a seed comes to look different


@dataclass(frozen=True)
class Scene:
    """One rendered view.

    Attributes:
        image: uint8 [H, W, 3], sRGB.
        depth: float32 [H, W], meters along the optical axis (as in NYUv2 and KITTI), within 0.1..10.
        semantics: uint8 [H, W], index into `CLASS_NAMES`.
        label: index into `LABEL_NAMES`.
    """

    image: Array
    depth: Array
    semantics: Array
    label: int


def render(seed: int, size: int | tuple[int, int] = 128) -> Scene:
    """Render the scene of a seed; another size shows the same scene.

    What the label says is visible in a square image; another aspect crops the square at its shorter sides.

    Args:
        seed: any integer >= 0.
        size: side of a square image, or (height, width), pixels.

    Returns:
        The scene; depth and classes are those of pixel centers, color at outlines is a mean over the pixel.

    Raises:
        ValueError: for a negative seed or a size below one pixel.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size must be at least 1 pixel, got {height} x {width} (height x width)")
    world = compose(seed)
    appearance = np.random.default_rng([1, seed])
    look = dress(appearance, world)

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

    classes = np.array([*FACE_CLASSES, *(CLASS_NAMES.index(p.kind) for p in world.primitives)], np.uint8)
    return Scene(
        image=np.ascontiguousarray(develop(appearance, look, light).T).reshape(height, width, 3),
        depth=depth.reshape(height, width),
        semantics=classes[surface].reshape(height, width),
        label=world.label,
    )


@dataclass(frozen=True)
class _View:
    """Shade rays from the camera; `pixel` is the width of a pixel at one meter, meters."""

    world: World
    look: Look
    pixel: float

    def shade(self, rays: Array) -> tuple[Array, Array, Array, Array, Array]:
        """Follow rays [3, N] and light what they meet.

        Returns:
            Light [3, N], depth [N], surface [N] (as in `trace`), unit normals [3, N], and how many lights
            are in sight [N].
        """
        room, primitives, camera = self.world.room, self.world.primitives, self.world.camera
        depth, surface = trace(room, primitives, camera.position, rays)
        points = camera.position.astype(np.float32)[:, None] + depth * rays
        towards = -rays / np.sqrt(np.einsum("dn,dn->n", rays, rays))

        normals = np.empty_like(points)
        albedo = np.empty_like(points)
        gloss = np.array([texture.gloss for texture in self.look.textures], np.float32)[surface]
        for i in np.flatnonzero(np.bincount(surface)):
            here = np.flatnonzero(surface == i)
            if i < FACES:
                facing, u, v = _face(int(i), points[:, here])
            else:
                facing, u, v = _skin(primitives[i - FACES], points[:, here], camera.position)
            normals[:, here] = facing
            slant = np.maximum(np.einsum("dn,dn->n", facing, towards[:, here]), 0.2)
            albedo[:, here] = paint(
                self.look.textures[i], self.look.noise, u, v, self.pixel * depth[here] / slant
            )

        fill = 1 + np.einsum("d,dn->n", self.look.fill.astype(np.float32), normals)
        shine = np.zeros_like(points)
        lit = np.zeros_like(depth)
        received = np.repeat(self.look.ambient * fill[None], 3, 0)
        for light in self.look.lights:
            center = light.positions.mean(0).astype(np.float32)[:, None]
            beam = center - points
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
            color = light.color.astype(np.float32)[:, None]
            received += color * (power * np.maximum(slope, 0))
            glossy = np.flatnonzero(gloss * power > 0)
            halfway = beam[:, glossy] + towards[:, glossy]
            halfway /= np.sqrt(np.einsum("dn,dn->n", halfway, halfway))
            lobe = np.maximum(np.einsum("dn,dn->n", normals[:, glossy], halfway), 0) ** 32
            shine[:, glossy] += color * (gloss[glossy] * power[glossy] * lobe)
        return albedo * received + shine, depth, surface, normals, lit

    def _reaches(self, position: Array, points: Array) -> Array:
        """Whether light from a position [3] arrives at points [3, n]; bool [n]."""
        rays = points - position.astype(np.float32)[:, None]
        limit = np.full(rays.shape[1], 0.998, np.float32)  # < 1: a surface does not shade itself
        surface = np.full(rays.shape[1], -1)
        return nearest(self.world.primitives, position, rays, limit, surface)[1] < 0


def _face(face: int, points: Array) -> tuple[Array, Array, Array]:
    """Inward normal [3, 1] and surface coordinates in meters [n], [n] of a face of the room."""
    axis = face // 2
    normal = np.zeros((3, 1), np.float32)
    normal[axis] = 1 - 2 * (face % 2)
    return normal, points[1 if axis == 0 else 0], points[1 if axis == 2 else 2]


def _skin(primitive: Primitive, points: Array, camera: Array) -> tuple[Array, Array, Array]:
    """Outward unit normals [3, n] and surface coordinates in m [n], [n] of points [3, n] on a primitive."""
    local = primitive.to_local(points - primitive.center.astype(np.float32)[:, None])
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
    eye = primitive.to_local(camera - primitive.center)
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
    """Mark pixels beside a change of surface, facet or shadow; bool [N]."""
    surface, lit = surface.reshape(height, width), lit.reshape(height, width)
    normals = normals.reshape(3, height, width)
    marked = np.zeros((height, width), bool)
    for one, two in ((np.s_[..., :-1, :], np.s_[..., 1:, :]), (np.s_[..., :-1], np.s_[..., 1:])):
        change = (surface[one] != surface[two]) | (np.abs(lit[one] - lit[two]) > 0.2)
        change |= np.einsum("dhw,dhw->hw", normals[one], normals[two]) < 0.8
        marked[one] |= change
        marked[two] |= change
    return marked.ravel()
