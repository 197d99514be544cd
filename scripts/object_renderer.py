"""Textured OBJ models and two renderers for them: OpenGL (moderngl on EGL) and ray casting (embreex).

Both renderers share one recipe, so that their pictures differ only by rounding and texture filtering:
- a pinhole camera with its principal point in the middle of a square picture, pixel centres at +0.5;
- colour = albedo x light, the light being fixed in the world. A headlight would change the colour of a point from view
  to view, which is what a method for novel views should not have to learn from furniture;
- 2x2 samples per pixel. A see-through surface covers that many of the four samples as its opacity says, so no sorting
  of surfaces is needed and alpha is always the share of covered samples.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import trimesh
from PIL import Image

SUPERSAMPLING = 2
"""Samples per pixel along each side of the pixel."""

OPACITY_THRESHOLDS = np.array([[0.125, 0.625], [0.875, 0.375]], dtype=np.float32)
"""[row, column] of a sample in its pixel: a surface covers the sample if its opacity is above this number."""

AMBIENT_LIGHT = 0.50
SKY_LIGHT = 0.10  # added where a surface looks up, taken away where it looks down
KEY_LIGHT = 0.42
FILL_LIGHT = 0.20
KEY_DIRECTION = np.array([0.45, -0.65, 0.61], dtype=np.float32) / np.linalg.norm([0.45, -0.65, 0.61])
FILL_DIRECTION = np.array([-0.75, 0.55, 0.37], dtype=np.float32) / np.linalg.norm([-0.75, 0.55, 0.37])

DEFAULT_COLOR = (0.7, 0.7, 0.7)
MAX_TEXTURE_SIDE = 1024  # larger ones only alias: the pictures are small and mipmaps stop at level MAX_MIPMAP_LEVEL
MAX_MIPMAP_LEVEL = 2  # coarser levels mix neighbouring patches of a texture atlas
CREASE_DEGREES = 40.0
MAX_CORNER_PAIRS = 20_000_000  # bounds the memory of corner_normals to about 1 GB

Y_UP_TO_Z_UP = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])


class NoGLContextError(RuntimeError):
    """No OpenGL 3.3 context can be had from EGL on this machine."""


@dataclass
class Surface:
    """A run of triangles with one material."""

    first_face: int
    num_faces: int
    color: tuple[float, float, float]
    """Albedo in [0, 1]; unused where there is a texture."""
    opacity: float
    texture: np.ndarray | None
    """[height, width, 4] uint8 RGBA, first row at the top (v = 1), or None."""


@dataclass
class ObjectMesh:
    """Triangles of one object, in world coordinates (+Z up). Corners are not shared between triangles."""

    positions: np.ndarray
    """[faces, 3 corners, 3] float32."""
    normals: np.ndarray
    """[faces, 3 corners, 3] float32, unit length."""
    uvs: np.ndarray
    """[faces, 3 corners, 2] float32, v up."""
    surfaces: list[Surface]


class Renderer(Protocol):
    """What the two renderers have in common."""

    def render(self, mesh: ObjectMesh, poses: np.ndarray, focal: float) -> np.ndarray:
        """Renders one object.

        Args:
            mesh: the object.
            poses: [views, 4, 4] camera-to-world, OpenGL axes (+X right, +Y up, -Z forward).
            focal: focal length in pixels.

        Returns:
            [views, resolution, resolution, 4] uint8 RGBA with straight (not premultiplied) alpha.
        """
        ...


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_object(path: Path, rotation: np.ndarray) -> ObjectMesh:
    """Loads an OBJ model with its materials and brings it to unit size.

    Args:
        path: the OBJ file; its coordinates are +Y up.
        rotation: [3, 3], applied to the file's coordinates first.

    Returns:
        The object with its bounding box centred on the origin, longest side 1, +Z up.

    Raises:
        ValueError: nothing in the file can be seen.
    """
    # trimesh reports every material it cannot read; those get the default colour and need no word.
    logging.getLogger("trimesh").setLevel(logging.CRITICAL)
    scene = trimesh.load(path, process=False, force="scene")
    parts = [part for part in scene.geometry.values() if isinstance(part, trimesh.Trimesh) and len(part.faces) > 0]
    if not parts:
        raise ValueError(f"{path.name} holds no triangles")

    positions, normals, uvs, surfaces = [], [], [], []
    first_face = 0
    textures: dict[int, np.ndarray] = {}
    for part in parts:
        surface = _read_surface(part, first_face, textures)
        if surface.opacity <= OPACITY_THRESHOLDS.min():
            continue  # it covers no sample, and would only make the camera step back
        surfaces.append(surface)
        first_face += len(part.faces)
        positions.append(np.asarray(part.vertices, dtype=np.float64)[part.faces])
        normals.append(_file_normals(part))
        uvs.append(_file_uvs(part))
    if not surfaces:
        raise ValueError(f"every material of {path.name} is fully transparent")

    transform = Y_UP_TO_Z_UP @ rotation
    corners = _to_unit_size(np.concatenate(positions) @ transform.T, path.name)
    corner_normals = _complete_normals(np.concatenate(normals) @ transform.T, corners)
    return ObjectMesh(
        positions=corners.astype(np.float32),
        normals=corner_normals.astype(np.float32),
        uvs=np.concatenate(uvs).astype(np.float32),
        surfaces=surfaces,
    )


def _to_unit_size(corners: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(corners).all():
        raise ValueError(f"{name} holds vertices that are not finite numbers")
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    if not (high - low).max() > 0:
        raise ValueError(f"all vertices of {name} are the same point")
    return (corners - (low + high) / 2) / (high - low).max()


def _read_surface(part: trimesh.Trimesh, first_face: int, textures: dict[int, np.ndarray]) -> Surface:
    material = getattr(part.visual, "material", None)
    properties = getattr(material, "kwargs", {})
    image = getattr(material, "image", None)
    texture = None
    if image is not None and getattr(part.visual, "uv", None) is not None:
        if id(image) not in textures:
            textures[id(image)] = _read_texture(image)
        texture = textures[id(image)]
    return Surface(
        first_face=first_face,
        num_faces=len(part.faces),
        color=_read_color(properties.get("kd")),
        opacity=_read_opacity(properties.get("d")),
        texture=texture,
    )


def _read_color(diffuse: object) -> tuple[float, float, float]:
    if not isinstance(diffuse, list) or len(diffuse) != 3:
        return DEFAULT_COLOR
    red, green, blue = np.clip(diffuse, 0.0, 1.0)
    return float(red), float(green), float(blue)


def _read_opacity(dissolve: object) -> float:
    try:
        return float(np.clip(float(dissolve[-1]), 0.0, 1.0))  # "d 0.5" or "d -halo 0.5"
    except (TypeError, ValueError, IndexError):
        return 1.0


def _read_texture(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    longest = max(image.size)
    if longest > MAX_TEXTURE_SIDE:
        width, height = (max(1, round(side * MAX_TEXTURE_SIDE / longest)) for side in image.size)
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    return np.asarray(image)


def _file_normals(part: trimesh.Trimesh) -> np.ndarray:
    # Asking the part for its normals would make up smooth ones where the file has none.
    normals = part._cache["vertex_normals"] if "vertex_normals" in part._cache else np.zeros((len(part.vertices), 3))
    return np.asarray(normals, dtype=np.float64)[part.faces]


def _file_uvs(part: trimesh.Trimesh) -> np.ndarray:
    uv = getattr(part.visual, "uv", None)
    if uv is None:
        return np.zeros((len(part.faces), 3, 2))
    return np.asarray(uv, dtype=np.float64)[part.faces][..., :2]


def _complete_normals(normals: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Unit normals: the file's own where it has usable ones, computed ones elsewhere."""
    lengths = np.linalg.norm(normals, axis=-1, keepdims=True)
    usable = np.isfinite(lengths) & (lengths > 1e-8)
    normals = np.where(usable, normals / np.where(usable, lengths, 1.0), 0.0)
    if usable.all():
        return normals
    return np.where(usable, normals, corner_normals(positions))


def corner_normals(positions: np.ndarray) -> np.ndarray:
    """Normals that are smooth over flat edges and break at sharp ones.

    A corner's normal is the area-weighted mean of the normals of those triangles around its point which are within
    CREASE_DEGREES of its own triangle.

    Args:
        positions: [faces, 3 corners, 3].

    Returns:
        [faces, 3 corners, 3] unit normals; triangles without area get +Z.
    """
    areas = np.cross(positions[:, 1] - positions[:, 0], positions[:, 2] - positions[:, 0])
    lengths = np.linalg.norm(areas, axis=-1, keepdims=True)
    flat = np.where(lengths > 0, areas / np.where(lengths > 0, lengths, 1.0), [0.0, 0.0, 1.0])

    point = _point_ids(positions.reshape(-1, 3))
    order = np.argsort(point, kind="stable")
    face = order // 3
    _, start, count = np.unique(point[order], return_index=True, return_counts=True)
    if int((count.astype(np.int64) ** 2).sum()) > MAX_CORNER_PAIRS:
        return np.repeat(flat[:, None], 3, axis=1)

    # Every corner is paired with every corner at the same point, itself included.
    partners = np.repeat(count, count)
    pair_start = np.cumsum(partners) - partners
    offset = np.arange(partners.sum()) - np.repeat(pair_start, partners)
    here = np.repeat(face, partners)
    there = face[np.repeat(np.repeat(start, count), partners) + offset]
    alike = np.einsum("ij,ij->i", flat[here], flat[there]) > np.cos(np.radians(CREASE_DEGREES))
    summed = np.add.reduceat(areas[there] * alike[:, None], pair_start, axis=0)
    summed_length = np.linalg.norm(summed, axis=-1, keepdims=True)
    smooth = np.where(summed_length > 0, summed / np.where(summed_length > 0, summed_length, 1.0), flat[face])

    result = np.empty_like(smooth)
    result[order] = smooth
    return result.reshape(-1, 3, 3)


def _point_ids(points: np.ndarray) -> np.ndarray:
    """[points] int64, the same number for points closer than about a millionth of the object's size."""
    low, high = points.min(axis=0), points.max(axis=0)
    grid = np.rint((points - low) / (high - low).max() * (2**20 - 1)).astype(np.int64)
    return (grid[:, 0] << 40) | (grid[:, 1] << 20) | grid[:, 2]


# ---------------------------------------------------------------------------------------------------------------------
# From samples to pixels
# ---------------------------------------------------------------------------------------------------------------------


def average_samples(samples: np.ndarray) -> np.ndarray:
    """Averages 2x2 samples to a pixel.

    Args:
        samples: [2 height, 2 width, 4] uint8, alpha 255 where something was hit and RGBA 0 elsewhere.

    Returns:
        [height, width, 4] uint8: alpha is the share of covered samples, the colour is the mean of the covered ones.
    """
    height, width = samples.shape[0] // SUPERSAMPLING, samples.shape[1] // SUPERSAMPLING
    blocks = samples.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, 4).astype(np.uint16)
    sums = blocks[:, 0] + blocks[:, 1]
    sums = sums[:, :, 0] + sums[:, :, 1]  # uncovered samples are 0, so this sum is the premultiplied one
    num_covered = np.maximum(sums[..., 3:] // 255, 1)
    color = (sums[..., :3] + num_covered // 2) // num_covered
    alpha = (sums[..., 3:] + 2) // SUPERSAMPLING**2
    return np.concatenate([color, alpha], axis=-1).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# OpenGL
# ---------------------------------------------------------------------------------------------------------------------

_VERTEX_SHADER = """
#version 330
uniform mat4 world_to_clip;
in vec3 in_position;
in vec3 in_normal;
in vec2 in_uv;
out vec3 position;
out vec3 normal;
out vec2 uv;
void main() {
    position = in_position;
    normal = in_normal;
    uv = in_uv;
    gl_Position = world_to_clip * vec4(in_position, 1.0);
}
"""

_FRAGMENT_SHADER = """
#version 330
uniform vec3 camera;
uniform vec4 color;
uniform bool textured;
uniform sampler2D albedo_texture;
uniform vec4 light;
uniform vec3 key_direction;
uniform vec3 fill_direction;
uniform vec4 thresholds;
in vec3 position;
in vec3 normal;
in vec2 uv;
out vec4 sample_color;
void main() {
    vec4 albedo = color;
    if (textured) {
        vec4 texel = texture(albedo_texture, uv);
        albedo = vec4(texel.rgb, texel.a * color.a);
    }
    ivec2 within_pixel = ivec2(gl_FragCoord.xy) % 2;
    if (albedo.a <= thresholds[2 * within_pixel.y + within_pixel.x]) discard;

    vec3 facing = cross(dFdx(position), dFdy(position));
    if (dot(facing, camera - position) < 0.0) facing = -facing;
    vec3 n = normalize(normal);
    if (dot(n, facing) < 0.0) n = -n;
    float brightness = light.x + light.y * n.z
        + light.z * max(dot(n, key_direction), 0.0) + light.w * max(dot(n, fill_direction), 0.0);
    sample_color = vec4(clamp(albedo.rgb * brightness, 0.0, 1.0), 1.0);
}
"""


class GLRenderer:
    """Renders with OpenGL 3.3 into an off-screen buffer; needs no display and no GPU (Mesa's llvmpipe will do)."""

    def __init__(self, resolution: int) -> None:
        import moderngl

        self._moderngl = moderngl
        try:
            self._context = moderngl.create_context(standalone=True, backend="egl", require=330)
        except Exception as error:  # moderngl raises bare Exception, ValueError or ImportError, as the cause may be
            raise NoGLContextError(str(error)) from error
        side = SUPERSAMPLING * resolution
        self._buffer = self._context.framebuffer(
            color_attachments=[self._context.renderbuffer((side, side), 4)],
            depth_attachment=self._context.depth_renderbuffer((side, side)),
        )
        self._resolution = resolution
        self._program = self._context.program(vertex_shader=_VERTEX_SHADER, fragment_shader=_FRAGMENT_SHADER)
        self._program["light"] = (AMBIENT_LIGHT, SKY_LIGHT, KEY_LIGHT, FILL_LIGHT)
        self._program["key_direction"] = tuple(KEY_DIRECTION)
        self._program["fill_direction"] = tuple(FILL_DIRECTION)
        # OpenGL counts rows from below, the thresholds are given from above.
        self._program["thresholds"] = tuple(OPACITY_THRESHOLDS[::-1].ravel())
        self._context.enable_only(moderngl.DEPTH_TEST)

    def describe(self) -> str:
        """The name of the device behind the context."""
        return self._context.info["GL_RENDERER"]

    def release(self) -> None:
        """Gives the context back."""
        self._context.release()

    def render(self, mesh: ObjectMesh, poses: np.ndarray, focal: float) -> np.ndarray:
        """See Renderer.render."""
        vertices = np.concatenate([mesh.positions, mesh.normals, mesh.uvs], axis=-1).astype(np.float32)
        vertex_buffer = self._context.buffer(vertices.tobytes())
        vertex_array = self._context.vertex_array(
            self._program, [(vertex_buffer, "3f 3f 2f", "in_position", "in_normal", "in_uv")]
        )
        textures = self._upload_textures(mesh)
        try:
            pictures = [self._render_view(mesh, vertex_array, textures, pose, focal) for pose in poses]
        finally:
            for resource in (vertex_array, vertex_buffer, *textures.values()):
                resource.release()
        return np.stack(pictures)

    def _upload_textures(self, mesh: ObjectMesh) -> dict:
        textures = {}
        for surface in mesh.surfaces:
            pixels = surface.texture
            if pixels is None or id(pixels) in textures:
                continue
            # OpenGL's first row is the lowest one.
            texture = self._context.texture((pixels.shape[1], pixels.shape[0]), 4, pixels[::-1].tobytes())
            texture.build_mipmaps(max_level=MAX_MIPMAP_LEVEL)
            texture.filter = (self._moderngl.LINEAR_MIPMAP_LINEAR, self._moderngl.LINEAR)
            textures[id(pixels)] = texture
        return textures

    def _render_view(
        self, mesh: ObjectMesh, vertex_array, textures: dict, pose: np.ndarray, focal: float
    ) -> np.ndarray:
        self._program["world_to_clip"].write(self._world_to_clip(mesh, pose, focal).T.astype(np.float32).tobytes())
        self._program["camera"] = tuple(pose[:3, 3])
        self._buffer.use()
        self._buffer.clear(0.0, 0.0, 0.0, 0.0, depth=1.0)
        for surface in mesh.surfaces:
            self._program["color"] = (*surface.color, surface.opacity)
            self._program["textured"] = surface.texture is not None
            if surface.texture is not None:
                textures[id(surface.texture)].use()
            vertex_array.render(vertices=3 * surface.num_faces, first=3 * surface.first_face)
        side = SUPERSAMPLING * self._resolution
        samples = np.frombuffer(self._buffer.read(components=4), dtype=np.uint8).reshape(side, side, 4)
        return average_samples(samples[::-1])

    def _world_to_clip(self, mesh: ObjectMesh, pose: np.ndarray, focal: float) -> np.ndarray:
        # Near and far planes hug the object's bounding sphere, for the best depth resolution.
        radius = 1.01 * float(np.linalg.norm(mesh.positions, axis=-1).max())
        distance = float(np.linalg.norm(pose[:3, 3]))
        near, far = max(distance - radius, 0.01), distance + radius
        scale = 2.0 * focal / self._resolution
        projection = np.array(
            [
                [scale, 0.0, 0.0, 0.0],
                [0.0, scale, 0.0, 0.0],
                [0.0, 0.0, -(far + near) / (far - near), -2.0 * far * near / (far - near)],
                [0.0, 0.0, -1.0, 0.0],
            ]
        )
        return projection @ np.linalg.inv(pose)


# ---------------------------------------------------------------------------------------------------------------------
# Ray casting
# ---------------------------------------------------------------------------------------------------------------------


class EmbreeRenderer:
    """Casts one ray per sample with embreex and shades with numpy; slower, and needs no OpenGL at all."""

    MAX_LAYERS = 16
    """See-through surfaces that a ray may pass before it is given up."""
    STEP = 1e-5
    """How far behind a see-through surface the ray goes on; the object's size is 1."""

    def __init__(self, resolution: int) -> None:
        self._resolution = resolution

    def render(self, mesh: ObjectMesh, poses: np.ndarray, focal: float) -> np.ndarray:
        """See Renderer.render."""
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene

        scene = EmbreeScene()
        TriangleMesh(scene, mesh.positions)
        surface_of_face = np.repeat(np.arange(len(mesh.surfaces)), [surface.num_faces for surface in mesh.surfaces])
        return np.stack([self._render_view(mesh, scene, surface_of_face, pose, focal) for pose in poses])

    def _render_view(
        self, mesh: ObjectMesh, scene, surface_of_face: np.ndarray, pose: np.ndarray, focal: float
    ) -> np.ndarray:
        side = SUPERSAMPLING * self._resolution
        directions = self._directions(pose, focal)
        origins = np.repeat(pose[None, :3, 3], side * side, axis=0).astype(np.float32)
        thresholds = np.tile(OPACITY_THRESHOLDS, (self._resolution, self._resolution)).ravel()
        samples = np.zeros((side * side, 4), dtype=np.uint8)
        rays = np.arange(side * side)
        for _ in range(self.MAX_LAYERS):
            hits = scene.run(origins[rays], directions[rays], query="INTERSECT", output=True)
            hit = hits["primID"] >= 0
            rays, face = rays[hit], hits["primID"][hit]
            if len(rays) == 0:
                break
            points = origins[rays] + hits["tfar"][hit, None] * directions[rays]
            weights = np.stack([1 - hits["u"] - hits["v"], hits["u"], hits["v"]], axis=-1)[hit]
            albedo = _albedo(mesh, surface_of_face[face], np.einsum("nc,ncd->nd", weights, mesh.uvs[face]))
            covered = albedo[:, 3] > thresholds[rays]
            normals = np.einsum("nc,ncd->nd", weights, mesh.normals[face])
            colors = albedo[:, :3] * _brightness(normals, hits["Ng"][hit], directions[rays])[:, None]
            samples[rays[covered], :3] = np.rint(255 * np.clip(colors[covered], 0, 1))
            samples[rays[covered], 3] = 255
            rays = rays[~covered]
            origins[rays] = points[~covered] + self.STEP * directions[rays]
        return average_samples(samples.reshape(side, side, 4))

    def _directions(self, pose: np.ndarray, focal: float) -> np.ndarray:
        """[samples, 3] unit directions in the world, row by row from the top left."""
        centres = (np.arange(SUPERSAMPLING * self._resolution) + 0.5) / SUPERSAMPLING - self._resolution / 2
        x, y = np.meshgrid(centres / focal, -centres / focal)
        directions = np.stack([x, y, -np.ones_like(x)], axis=-1).reshape(-1, 3) @ pose[:3, :3].T
        return (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32)


def _albedo(mesh: ObjectMesh, surface_index: np.ndarray, uvs: np.ndarray) -> np.ndarray:
    """[points, 4] float32 colour and opacity of the surfaces at the points' texture coordinates."""
    albedo = np.empty((len(surface_index), 4), dtype=np.float32)
    for index in np.unique(surface_index):
        surface, here = mesh.surfaces[index], surface_index == index
        if surface.texture is None:
            albedo[here] = (*surface.color, surface.opacity)
        else:
            albedo[here] = _sample_texture(surface.texture, uvs[here])
            albedo[here, 3] *= surface.opacity
    return albedo


def _sample_texture(texture: np.ndarray, uvs: np.ndarray) -> np.ndarray:
    """Bilinear, repeating. uvs [points, 2] with v up -> [points, 4] float32 in [0, 1]."""
    height, width = texture.shape[:2]
    uvs = np.nan_to_num(uvs)
    column, row = uvs[:, 0] * width - 0.5, (1 - uvs[:, 1]) * height - 0.5
    left, top = np.floor(column).astype(np.int64), np.floor(row).astype(np.int64)
    right_share, bottom_share = (column - left)[:, None], (row - top)[:, None]
    rows, columns = (top % height, (top + 1) % height), (left % width, (left + 1) % width)
    upper = texture[rows[0], columns[0]] * (1 - right_share) + texture[rows[0], columns[1]] * right_share
    lower = texture[rows[1], columns[0]] * (1 - right_share) + texture[rows[1], columns[1]] * right_share
    return ((upper * (1 - bottom_share) + lower * bottom_share) / 255).astype(np.float32)


def _brightness(normals: np.ndarray, geometric: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """[points] light on two-sided surfaces; normals, geometric normals and ray directions are [points, 3]."""
    facing = np.where(np.einsum("ij,ij->i", geometric, directions)[:, None] > 0, -geometric, geometric)
    normals = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    normals = np.where(np.einsum("ij,ij->i", normals, facing)[:, None] < 0, -normals, normals)
    return (
        AMBIENT_LIGHT
        + SKY_LIGHT * normals[:, 2]
        + KEY_LIGHT * np.maximum(normals @ KEY_DIRECTION, 0)
        + FILL_LIGHT * np.maximum(normals @ FILL_DIRECTION, 0)
    )
