"""Controls in nerfstudio's viewer: which views are the context, how a frame is rendered, where the network looks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path
from threading import Thread, current_thread
from typing import Literal, NamedTuple, Optional
from weakref import WeakKeyDictionary

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.viewer.viewer import Viewer
from nerfstudio.viewer.viewer_elements import (
    ViewerButton,
    ViewerCheckbox,
    ViewerControl,
    ViewerDropdown,
    ViewerElement,
    ViewerSlider,
    ViewerText,
)
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException
from torch import Tensor, nn
from viser import ViserServer

from elvsm_nerfstudio.cameras import on_cpu, views_from_cameras
from elvsm_nerfstudio.data.view_geometry import farthest_point_views
from elvsm_nerfstudio.geometry import nearest_views
from elvsm_nerfstudio.model import EfficientLVSMModel, RenderOutputs, enlarge, joined
from elvsm_nerfstudio.nn.efficient_lvsm import EfficientLVSM
from elvsm_nerfstudio.nn.memory import SceneMemory, load_memory
from elvsm_nerfstudio.viewer.attention_maps import decode_with_attention, evenness
from elvsm_nerfstudio.viewer.context_pool import ContextPool
from elvsm_nerfstudio.viewer.frustums import Frustums, view_colour

FOLDER = "Context views"
"""Heading of the controls."""
MAX_BOXES = 12
"""A scene with more candidates has a list of them instead of a box for each."""
ADDING_SECONDS = 0.5
"""A frame waits no longer for views to be added; what is left is added by the next ones."""
LARGEST_SIZE = 1024
"""Pixels in height up to which frames may be computed, unless the context images are larger."""
ATTENTION = {"attention_view": 3, "attention_evenness": 1}
"""Outputs beside rgb, computed only where somebody looks at them, and their channels."""

Mode = Literal["manual", "farthest point", "nearest to camera"]


class Plan(NamedTuple):
    """Which views are to be the context; replaced as a whole, since another thread reads it."""

    mode: Mode
    frames: tuple[int, ...]
    """Empty where they depend on the camera."""


class ViewerMarkdown(ViewerElement[str]):
    """Text that only the program changes. (nerfstudio's ViewerText asks for another render whenever it is set.)"""

    def __init__(self):
        super().__init__("")

    def install(self, viser_server: ViserServer) -> None:
        self.gui_handle = viser_server.gui.add_markdown("")

    def show(self, text: str) -> None:
        """Shows Markdown; what comes from outside has to be ``plain``."""
        if self.gui_handle is not None and self.gui_handle.content != text:
            self.gui_handle.content = text


def plain(text: str) -> str:
    """Markdown that reads as the text. viser renders Markdown with JSX in it, so that a file's name could be a script:
    all that is no letter, digit or space becomes a character reference."""
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" if c.isprintable() else " " for c in text)


class Elements(nn.Module):
    """Holds elements where nerfstudio's viewer looks for them: it walks modules, in the order of their names."""

    def __init__(self, elements: Sequence[ViewerElement | ViewerControl]):
        super().__init__()
        for position, element in enumerate(elements):
            setattr(self, f"element_{position:03d}", element)


class OnStart(ViewerControl):
    """Calls back once a viewer has found it."""

    def __init__(self, callback: Callable[[Viewer], None]):
        self._callback = callback

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        self._callback(viewer)


class ContextControls:
    """Renders for the viewer as its controls say, from the moment a viewer is there; other programs never notice.

    Callbacks of the elements only note what is wanted. Reading and encoding views is left to the render thread, a
    little at a time, and nothing that goes wrong there gets out of ``render``: it would end the thread unseen.
    """

    def __init__(
        self,
        model: EfficientLVSMModel,
        pool: ContextPool,
        scenes: Sequence[str] = (),
        shown: str = "",
        show: Optional[Callable[[str], ContextPool]] = None,
        use_weights: Optional[Callable[[str], ContextPool]] = None,
    ):
        """The controls of one or several scenes.

        Args:
            scenes: that can be shown; ``shown`` is.
            show: shows another one and gives the model its context.
            use_weights: gives the model other weights, and the context of the same scene for them.
        """
        self._model, self._pool = model, pool
        self._shown, self._show, self._use_weights = shown, show, use_weights
        self._wish: Optional[Callable[[], None]] = None
        self._position = {frame: position for position, frame in enumerate(pool.frames)}
        self._plan = Plan("manual", pool.context)
        self._unusable: dict[int, str] = {}
        self._viewer: Optional[Viewer] = None
        self._frustums: Optional[Frustums] = None
        self._memory: Optional[SceneMemory] = None
        self._update_ms = 0.0
        # Every browser has a render thread of its own.
        self._last: WeakKeyDictionary[Thread, RenderOutputs] = WeakKeyDictionary()
        self._asked: WeakKeyDictionary[Thread, tuple[Plan, tuple[int, ...]]] = WeakKeyDictionary()
        self._error = self._news = ""
        self._make_elements(scenes)

    def _make_elements(self, scenes: Sequence[str]) -> None:
        pool, names = self._pool, self._pool.names
        several = len(scenes) > 1
        self._scene = (
            ViewerDropdown("Scene", self._shown, list(scenes), hint="Of the evaluated split") if several else None
        )
        self._choice = ViewerDropdown(
            "Choice", "manual", ["manual", "farthest point", "nearest to camera"], cb_hook=lambda _: self._choose(),
            hint="How the context views are chosen: one by one, spread over the scene, or for each frame anew",
        )  # fmt: skip
        self._count = ViewerSlider(
            "Number", len(pool.context), 1, max(32 if several else 2, len(names)), 1, disabled=True,
            cb_hook=lambda _: self._resize(),
            hint="Context views, where they are not chosen one by one",
        )  # fmt: skip
        few = len(names) <= MAX_BOXES and not several
        self._boxes = {
            frame: ViewerCheckbox(
                f"View {name}", frame in pool.context, cb_hook=lambda box, frame=frame: self._use(frame, box.value)
            )
            for frame, name in zip(pool.frames, names)
            if few
        }
        self._listed = ViewerDropdown("View", names[0], list(names), hint="View to add or drop")
        add = ViewerButton("Add view", lambda _: self._use(self._listed_frame(), True))
        drop = ViewerButton("Drop view", lambda _: self._use(self._listed_frame(), False))
        self._one_by_one = list(self._boxes.values()) if few else [self._listed, add, drop]
        patch, at_first = self._model.config.network.patch_size, self._render_size()
        self._size = ViewerSlider(
            "Render size", at_first, patch, max(LARGEST_SIZE, at_first), patch,
            hint="Frames are computed as finely as context images of so many pixels in height, no finer, and enlarged "
            "from that. At the height of the context images a patch covers the angle that the network knows",
        )  # fmt: skip
        self._precision = ViewerDropdown(
            "Precision", "fp32" if self._model.network.autocast_dtype is None else "bf16", ["bf16", "fp32"],
            hint="Of the transformer. Not while training, which has it in common",
        )  # fmt: skip
        self._weights = ViewerText(
            "Weights", "", hint="A name of `elvsm weights`, hf://OWNER/REPO/FILE or a file. Not while training"
        )
        self._load = ViewerButton("Load weights", lambda _: self._ask(self._change_weights, self._weights))
        file = ViewerText("Memory", "", hint="A .safetensors file with the views in use as the network remembers them")
        save = ViewerButton("Save memory", lambda _: self._ask(self._save_memory, file))
        load = ViewerButton("Load memory", lambda _: self._ask(self._load_memory, file))
        self._status = ViewerMarkdown()
        self.elements = Elements(
            [*filter(None, [self._scene]), self._choice, self._count, *self._one_by_one, self._size, self._precision,
             self._weights, self._load, file, save, load, self._status, OnStart(self._start)]
        )  # fmt: skip

    def _start(self, viewer: Viewer) -> None:
        self._viewer, self._frustums = viewer, Frustums(viewer, self._pool)
        for element in (self._precision, self._weights, self._load):
            element.set_disabled(viewer.trainer is not None)
        self._model.warm_up()
        self._model.render_for_viewer = self.render

    # What is wanted. Callbacks also come, later and in another thread, for values that were set here: they must find
    # nothing to do.

    def _choose(self) -> None:
        mode = self._choice.value
        if mode == self._plan.mode:
            return
        frames = {"manual": self._model.context_ids, "farthest point": self._spread(), "nearest to camera": ()}[mode]
        self._follow(Plan(mode, frames))

    def _resize(self) -> None:
        if self._plan.mode == "farthest point" and len(self._plan.frames) != self._count.value:
            self._follow(Plan("farthest point", self._spread()))

    def _use(self, frame: int, wanted: bool) -> None:
        frames = self._plan.frames or self._model.context_ids
        if wanted == (frame in frames):
            return
        changed = (*frames, frame) if wanted else tuple(other for other in frames if other != frame)
        # At least one view has to stay: the box is ticked again.
        self._follow(Plan("manual", changed) if changed else self._plan)

    def _follow(self, plan: Plan) -> None:
        self._plan = plan
        by_camera = plan.mode == "nearest to camera"
        self._count.set_disabled(plan.mode == "manual")
        for element in self._one_by_one:
            element.set_visible(not by_camera)
        values = {self._choice: plan.mode}
        if not by_camera:
            values[self._count] = len(plan.frames)
            values.update({box: frame in plan.frames for frame, box in self._boxes.items()})
        for element, value in values.items():
            if element.value != value:
                element.value = value

    def _spread(self) -> tuple[int, ...]:
        number = min(self._count.value, len(self._pool.frames))
        return tuple(self._pool.frames[i] for i in farthest_point_views(self._pool.poses, number))

    def _ask(self, action: Callable[[str], None], text: ViewerText) -> None:
        if text.value.strip():
            self._wish = partial(action, text.value.strip())

    def _render_size(self) -> int:
        """How finely frames are computed unless somebody moves the slider."""
        made_for, asked = int(self._pool.cameras.height[0]), self._model.config.render_size
        return {"trained": made_for, "native": max(LARGEST_SIZE, made_for)}.get(asked, asked)

    def _listed_frame(self) -> int:
        return self._pool.frames[self._pool.names.index(self._listed.value)]

    def _change_scene(self) -> None:
        """Shows the scene that is asked for; where it cannot be, the one before stays and the reason is told."""
        asked = self._scene.value
        try:
            self._take(self._show(asked))
        except ValueError as error:
            self._news, self._scene.value = f"Scene {asked} cannot be shown: {error}", self._shown
            return
        self._shown = asked
        self._listed.set_options(list(self._pool.names))
        self._follow(Plan("manual", self._pool.context))

    def _change_weights(self, asked: str) -> None:
        """Renders with other weights, from the same views; where they cannot be used, those before stay and the reason
        is told."""
        self._status.show(f"**Loading weights {plain(asked)}**")
        try:
            self._take(self._use_weights(asked))
        except Exception as error:  # whatever a file or a device has against them
            self._news = f"Weights {asked} cannot be used: {error}"
            return
        self._size.value = self._render_size()

    def _save_memory(self, file: str) -> None:
        path = Path(file)
        try:
            if path.suffix != ".safetensors" or path.exists():
                raise ValueError(f"{path} exists already" if path.exists() else f"{path} does not end in .safetensors")
            memory = self._model.memory()
            memory.save(path)
        except (ValueError, OSError) as error:
            self._news = f"The memory cannot be saved: {error}"
            return
        self._news = f"Memory of {memory.num_views} views saved as {path}"

    def _load_memory(self, file: str) -> None:
        """Renders from a memory of views of this scene; where that is not possible, the reason is told."""
        try:
            memory = load_memory(file, self._model.rendering_network)
            absent = [id for id in memory.ids if id not in self._position]
            if absent or memory.num_scenes != 1 or not memory.ids:
                raise ValueError(f"it is of other frames ({', '.join(map(str, absent)) or 'none'}) than this scene has")
            self._model.use_memory(memory, reduce(joined, map(self._pool.read, memory.ids)))
        except (ValueError, OSError, MemoryError) as error:
            self._news = f"The memory {file} cannot be used: {error}"
            return
        self._news = f"Memory of {memory.num_views} views read from {file}"
        self._follow(Plan("manual", memory.ids))

    def _take(self, pool: ContextPool) -> None:
        self._pool, self._news = pool, ""
        self._position = {frame: position for position, frame in enumerate(pool.frames)}
        self._unusable, self._memory = {}, None
        self._last.clear()
        self._frustums.clear()
        self._frustums = Frustums(self._viewer, pool)

    # Rendering

    @torch.no_grad()
    def render(self, camera: Cameras) -> RenderOutputs:
        """A frame for the viewer: where it cannot be rendered, the last one, or grey, and the reason in the panel."""
        camera = on_cpu(camera.reshape((1,)))
        size = max(1, int(camera.height[0])), max(1, int(camera.width[0]))
        compiled = self._model.network.compiler is not None
        try:
            with _uninterrupted() if compiled else nullcontext():  # an interrupt would look like a failure to compile
                return self._render(camera, size)
        except IOChangeException:  # the viewer wants another frame instead
            raise
        except Exception as error:  # whatever it is, it must not end the render thread
            with _uninterrupted():
                self._report(error)
            last = self._last.get(current_thread()) or RenderOutputs(
                rgb=torch.full((1, 1, 3), 0.5, device=self._model.device)
            )
            return self._complete({name: enlarge(last[name], size) for name in last})

    def _render(self, camera: Cameras, size: tuple[int, int]) -> RenderOutputs:
        model, watched = self._model, self._watched()
        if self._viewer.trainer is None:
            model.set_precision(self._precision.value)
        if self._scene is not None and self._scene.value != self._shown:
            with _uninterrupted():
                self._change_scene()
        wish, self._wish = self._wish, None
        if wish is not None:
            with _uninterrupted():
                wish()
        start = self._now()
        wanted = self._wanted(camera)
        unfinished = self._update_context(wanted)
        memory = model.memory()
        encoded = self._now()
        if memory is not self._memory:
            self._memory, self._update_ms = memory, (encoded - start) * 1e3
        ours = [id for id in memory.ids if id in wanted]
        memory = memory.select(ours or memory.ids)

        camera = model.no_finer(camera, self._size.value)
        height, width = int(camera.height[0]), int(camera.width[0])
        if watched:
            patch = model.config.network.patch_size
            target = views_from_cameras(camera, patch, device=model.device)
            rgb, shares = decode_with_attention(model.rendering_network, memory, target)
            decoded = self._now()
            outputs = {"rgb": rgb[0, 0], **self._maps(shares[0, 0], memory.ids, patch)}
            outputs = {name: map[:height, :width] for name, map in outputs.items()}
        else:
            outputs = model.render(memory, camera)
            decoded = self._now()
        outputs = self._complete({name: enlarge(map, size, name in ATTENTION) for name, map in outputs.items()})
        self._last[current_thread()], self._error = outputs, ""
        with _uninterrupted():
            self._describe(memory, (decoded - encoded) * 1e3, (height, width), unfinished)
            self._frustums.draw(model.context_images(), by_view="attention_view" in watched)
            if unfinished:
                self._viewer._trigger_rerender()
        return outputs

    def _wanted(self, camera: Cameras) -> tuple[int, ...]:
        plan, frames = self._plan, self._pool.frames
        wanted = plan.frames
        if plan.mode == "nearest to camera":
            pose = camera.camera_to_worlds[0].to(self._pool.poses)
            count = min(self._count.value, len(frames))
            wanted = tuple(frames[i] for i in nearest_views(self._pool.poses, pose[None], count)[0].tolist())
        return tuple(frame for frame in wanted if frame not in self._unusable)

    def _update_context(self, wanted: tuple[int, ...]) -> int:
        """Brings the context to what is wanted as far as time allows; the number of views still to be added.

        What other browsers want of the same plan stays: where views depend on the camera, they would drop each other's.
        """
        model, end = self._model, time.perf_counter() + ADDING_SECONDS
        self._asked[current_thread()] = self._plan, wanted
        everyones = {frame for plan, frames in list(self._asked.values()) if plan is self._plan for frame in frames}
        missing = [frame for frame in wanted if frame not in model.context_ids]
        while missing and time.perf_counter() < end:
            frame = missing.pop(0)
            try:
                view = self._pool.read(frame)
            except ValueError as error:
                self._unusable[frame] = str(error)
                continue
            model.edit_context(view, [frame])
            model.memory()
        drop = [frame for frame in model.context_ids if frame not in everyones]
        if drop and len(drop) < len(model.context_ids):
            model.edit_context(drop=drop)
        return len(missing)

    def _maps(self, shares: Tensor, ids: Sequence[int], patch: int) -> dict[str, Tensor]:
        colours = torch.tensor([view_colour(self._position[id]) for id in ids], device=shares.device)
        maps = {
            "attention_view": (colours / 255)[shares.argmax(dim=-1)],
            "attention_evenness": evenness(shares)[..., None],
        }
        return {name: map.repeat_interleave(patch, 0).repeat_interleave(patch, 1) for name, map in maps.items()}

    def _complete(self, outputs: dict[str, Tensor]) -> RenderOutputs:
        """The outputs under all names that the viewer is to list: those that nobody looks at are black."""
        blank = torch.zeros_like(outputs["rgb"][..., :1])
        blanks = {name: blank.expand(-1, -1, channels) for name, channels in self._attention.items()}
        return RenderOutputs({"rgb": outputs["rgb"], **blanks, **outputs})

    @property
    def _attention(self) -> dict[str, int]:
        # The other networks have no attention of targets to context views apart from the rest.
        return ATTENTION if isinstance(self._model.network, EfficientLVSM) else {}

    def _watched(self) -> set[str]:
        """The outputs of attention that somebody looks at."""
        panel = self._viewer.control_panel
        return {panel.output_render, panel.split_output_render if panel.split else ""} & set(self._attention)

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter()

    # The panel

    def _describe(self, memory: SceneMemory, decode_ms: float, size: tuple[int, int], unfinished: int) -> None:
        names = [plain(self._pool.names[self._position[id]]) for id in sorted(memory.ids)]
        shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
        lines = [f"**{len(names)} of {len(self._pool.frames)} views in use:** {shown}"]
        if self._news:
            lines.append(plain(self._news))
        if unfinished:
            lines.append(f"**{unfinished} more to be added**")
        lines += [f"View {frame} left out: {plain(reason)}" for frame, reason in self._unusable.items()]
        precision = str(memory.dtype).removeprefix("torch.")
        lines += [
            f"Context updated in {self._update_ms:.1f} ms, frame rendered in {decode_ms:.1f} ms at {size[1]}x{size[0]}",
            f"Memory: {memory.num_bytes / 2**20:.1f} MiB, {memory.num_tokens} tokens, {precision}",
        ]
        self._status.show("  \n".join(lines))

    def _report(self, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._status.show(f"**This frame could not be rendered:** {plain(reason)}")
        if reason != self._error:
            self._error = reason
            CONSOLE.print_exception()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """The viewer interrupts a render by raising in it at any line; viser would then keep the lock of its messages."""
    trace = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(trace)
