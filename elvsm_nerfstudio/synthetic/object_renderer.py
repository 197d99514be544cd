"""Two renderers for object meshes: OpenGL (moderngl on EGL) and ray casting (embreex).

They share one recipe, so that their pictures differ only by rounding and texture filtering:
- a pinhole camera with its principal point in the middle of a square picture, pixel centres at +0.5;
- colour = albedo x light, the light being fixed in the world. A headlight would change the colour of a point from view
  to view, which is what a method for novel views should not have to learn from furniture;
- 2x2 samples per pixel. A see-through surface covers that many of the four samples as its opacity says, so no sorting
  of surfaces is needed and alpha is always the share of covered samples.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from elvsm_nerfstudio.synthetic.object_mesh import MIN_OPACITY, ObjectMesh, Surface

SUPERSAMPLING = 2
"""Samples per pixel along each side of the pixel."""

OPACITY_THRESHOLDS = np.array([[MIN_OPACITY, 0.625], [0.875, 0.375]], dtype=np.float32)
"""[row, column] of a sample in its pixel: a surface covers the sample if its opacity is above this number."""

AMBIENT_LIGHT = 0.50
SKY_LIGHT = 0.10  # added where a surface looks up, taken away where it looks down
KEY_LIGHT = 0.42
FILL_LIGHT = 0.20
KEY_DIRECTION = np.array([0.45, -0.65, 0.61], dtype=np.float32) / np.linalg.norm([0.45, -0.65, 0.61])
FILL_DIRECTION = np.array([-0.75, 0.55, 0.37], dtype=np.float32) / np.linalg.norm([-0.75, 0.55, 0.37])


class NoGLContextError(RuntimeError):
    """No OpenGL 3.3 context can be had from EGL on this machine."""


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

SURFACE_SHADER = """
#version 330
uniform vec3 camera;
uniform vec4 color;
uniform bool textured;
uniform sampler2D albedo_texture;
uniform vec4 thresholds;
in vec3 position;
in vec3 normal;
in vec2 uv;
out vec4 sample_color;

// Colour of the surface, and its normal on the camera's side; ends the fragment where the surface is see-through.
void look_at_surface(out vec4 albedo, out vec3 n) {
    albedo = color;
    if (textured) {
        vec4 texel = texture(albedo_texture, uv);
        albedo = vec4(texel.rgb, texel.a * color.a);
    }
    ivec2 within_pixel = ivec2(gl_FragCoord.xy) % 2;
    if (albedo.a <= thresholds[2 * within_pixel.y + within_pixel.x]) discard;

    vec3 facing = cross(dFdx(position), dFdy(position));
    if (dot(facing, camera - position) < 0.0) facing = -facing;
    n = normalize(normal);
    if (dot(n, facing) < 0.0) n = -n;
}
"""
"""What every fragment shader begins with."""

_FRAGMENT_SHADER = f"""{SURFACE_SHADER}
uniform vec4 light;
uniform vec3 key_direction;
uniform vec3 fill_direction;
void main() {{
    vec4 albedo;
    vec3 n;
    look_at_surface(albedo, n);
    float brightness = light.x + light.y * n.z
        + light.z * max(dot(n, key_direction), 0.0) + light.w * max(dot(n, fill_direction), 0.0);
    sample_color = vec4(clamp(albedo.rgb * brightness, 0.0, 1.0), 1.0);
}}
"""


class GLMeshRenderer:
    """Renders meshes with OpenGL 3.3 into an off-screen buffer; needs no display and no GPU (Mesa's llvmpipe will do).

    Subclasses say how surfaces are lit, and what is near and far.

    Args:
        size: (height, width) of the pictures.
        fragment_shader: GLSL that begins with SURFACE_SHADER and sets ``sample_color``.
    """

    def __init__(self, size: tuple[int, int], fragment_shader: str) -> None:
        import moderngl

        self._moderngl = moderngl
        try:
            self._context = moderngl.create_context(standalone=True, backend="egl", require=330)
        except Exception as error:  # moderngl raises bare Exception, ValueError or ImportError, as the cause may be
            raise NoGLContextError(str(error)) from error
        self._size = size
        self._samples = SUPERSAMPLING * size[0], SUPERSAMPLING * size[1]
        self._buffer = self._context.framebuffer(
            color_attachments=[self._context.renderbuffer(self._samples[::-1], 4)],
            depth_attachment=self._context.depth_renderbuffer(self._samples[::-1]),
        )
        self._program = self._context.program(vertex_shader=_VERTEX_SHADER, fragment_shader=fragment_shader.strip())
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
            texture.build_mipmaps(max_level=surface.max_mipmap_level)
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
            self._set_surface(surface)
            if surface.texture is not None:
                textures[id(surface.texture)].use()
            vertex_array.render(vertices=3 * surface.num_faces, first=3 * surface.first_face)
        samples = np.frombuffer(self._buffer.read(components=4), dtype=np.uint8).reshape(*self._samples, 4)
        return average_samples(samples[::-1])

    def _set_surface(self, surface: Surface) -> None:
        self._program["color"] = (*surface.color, surface.opacity)
        self._program["textured"] = surface.texture is not None

    def _near_and_far(self, mesh: ObjectMesh, pose: np.ndarray) -> tuple[float, float]:
        raise NotImplementedError

    def _world_to_clip(self, mesh: ObjectMesh, pose: np.ndarray, focal: float) -> np.ndarray:
        near, far = self._near_and_far(mesh, pose)
        height, width = self._size
        projection = np.array(
            [
                [2.0 * focal / width, 0.0, 0.0, 0.0],
                [0.0, 2.0 * focal / height, 0.0, 0.0],
                [0.0, 0.0, -(far + near) / (far - near), -2.0 * far * near / (far - near)],
                [0.0, 0.0, -1.0, 0.0],
            ]
        )
        return projection @ np.linalg.inv(pose)


class GLRenderer(GLMeshRenderer):
    """Renders objects into square pictures."""

    def __init__(self, resolution: int) -> None:
        super().__init__((resolution, resolution), _FRAGMENT_SHADER)
        self._program["light"] = (AMBIENT_LIGHT, SKY_LIGHT, KEY_LIGHT, FILL_LIGHT)
        self._program["key_direction"] = tuple(KEY_DIRECTION)
        self._program["fill_direction"] = tuple(FILL_DIRECTION)

    def _near_and_far(self, mesh: ObjectMesh, pose: np.ndarray) -> tuple[float, float]:
        # The planes hug the object's bounding sphere, for the best depth resolution.
        radius = 1.01 * float(np.linalg.norm(mesh.positions, axis=-1).max())
        distance = float(np.linalg.norm(pose[:3, 3]))
        return max(distance - radius, 0.01), distance + radius


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
