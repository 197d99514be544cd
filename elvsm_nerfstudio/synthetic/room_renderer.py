"""Renders rooms: light through a window and from a lamp, darker corners. OpenGL only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elvsm_nerfstudio.synthetic.object_mesh import ObjectMesh, Surface
from elvsm_nerfstudio.synthetic.object_renderer import SURFACE_SHADER, GLMeshRenderer
from elvsm_nerfstudio.synthetic.room_layout import RoomPlan

NEAR, FAR = 0.05, 20.0
"""Metres."""

_FRAGMENT_SHADER = (
    SURFACE_SHADER
    + """
uniform float emission;
uniform vec3 room;
uniform vec3 ambient_color;
uniform vec3 window_position;
uniform vec3 window_color;
uniform vec3 lamp_position;
uniform vec3 lamp_color;

// Light that a corner takes away: a plane at some distance darkens what does not lie in it.
float open_to(float distance, float along_normal) {
    return 1.0 - 0.38 * exp(-max(distance, 0.0) / 0.22) * (1.0 - smoothstep(0.6, 0.9, abs(along_normal)));
}

vec3 light_from(vec3 source, vec3 light, vec3 n, float reach) {
    vec3 to = source - position;
    float distance = length(to);
    float wrapped = 0.5 + 0.5 * dot(n, to) / distance;
    return light * wrapped * wrapped / (1.0 + distance * distance / (reach * reach));
}

void main() {
    vec4 albedo;
    vec3 n;
    look_at_surface(albedo, n);
    float corners = open_to(position.z, n.z) * open_to(room.z - position.z, n.z)
        * open_to(position.x, n.x) * open_to(room.x - position.x, n.x)
        * open_to(position.y, n.y) * open_to(room.y - position.y, n.y);
    vec3 light = ambient_color * (0.92 + 0.08 * n.z)
        + light_from(window_position, window_color, n, 3.0)
        + light_from(lamp_position, lamp_color, n, 2.5);
    vec3 lit = albedo.rgb * mix(light * corners, vec3(1.0), emission);
    // A soft shoulder instead of burnt-out whites.
    sample_color = vec4(lit / (1.0 + 0.15 * lit * lit), 1.0);
}
"""
)


@dataclass(frozen=True)
class Lighting:
    """Lights of a room, fixed in the world; colours are linear RGB."""

    ambient: np.ndarray
    window_position: np.ndarray
    window: np.ndarray
    lamp_position: np.ndarray
    lamp: np.ndarray


def draw_lighting(rng: np.random.Generator, plan: RoomPlan) -> Lighting:
    """Daylight or evening, cold or warm, from the plan's window and a lamp at the ceiling."""
    width, depth, height = plan.size
    window = next(panel for panel in plan.panels if panel.kind == "window")
    inside = 0.6
    position = (
        (window.along, depth - inside),
        (inside, window.along),
        (window.along, inside),
        (width - inside, window.along),
    )[window.wall]
    warm = np.array([1.0, rng.uniform(0.78, 0.92), rng.uniform(0.55, 0.8)])
    cold = np.array([rng.uniform(0.85, 0.95), rng.uniform(0.92, 1.0), 1.0])
    day = rng.uniform(0.3, 1.0)
    return Lighting(
        ambient=rng.uniform(0.42, 0.6) * (day * cold + (1 - day) * warm),
        window_position=np.array([*position, window.centre_height + 0.2]),
        window=rng.uniform(0.9, 1.5) * day * cold,
        lamp_position=np.array([width * rng.uniform(0.35, 0.65), depth * rng.uniform(0.35, 0.65), height - 0.25]),
        lamp=rng.uniform(0.6, 1.1) * (1.3 - day) * warm,
    )


class RoomRenderer(GLMeshRenderer):
    """Renders one room after another into pictures of one size."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(size, _FRAGMENT_SHADER)

    def set_room(self, plan: RoomPlan, lighting: Lighting) -> None:
        """Lights of the room that is rendered next."""
        values = {
            "room": plan.size,
            "ambient_color": lighting.ambient,
            "window_position": lighting.window_position,
            "window_color": lighting.window,
            "lamp_position": lighting.lamp_position,
            "lamp_color": lighting.lamp,
        }
        for name, value in values.items():
            self._program[name] = tuple(float(x) for x in value)

    def _set_surface(self, surface: Surface) -> None:
        super()._set_surface(surface)
        self._program["emission"] = surface.emission

    def _near_and_far(self, mesh: ObjectMesh, pose: np.ndarray) -> tuple[float, float]:
        return NEAR, FAR
