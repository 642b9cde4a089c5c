"""The page of `foveal ui`: pick a clip, a layer and a head, click a token, move the sliders.

It needs gradio. By default only this machine can reach the page, and nothing is sent anywhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveal.lab.pipelines import LoadedPipeline
from foveal.lab.ui.scene import Scene, Sheet, View, clip_scene, view
from foveal.methods.base import METHODS, Config, method_of
from foveal.models.shipped import shipped_clips

EXPLANATION = (
    "Click a token. **Bright** tokens it reads exactly, **dim** ones through the global branch (SLA's linear branch or "
    "pooled tail, VSA's coarse stage), **dark** ones not at all. The red frame is the token itself."
)

# What the page calls the choice of a policy file.
POLICY = "the policy file, with its own ratios"

# A number field is clamped to its range when it loses the focus; Enter is to do the same.
ENTER_ENDS_TYPING = """() => document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("input[type=number]")) event.target.blur();
})"""


@dataclass(frozen=True)
class State:
    """What one visitor looks at.

    Attributes:
        scene: the video and its attention.
        sheet: the scene's frames, arranged in one picture.
        token: the token that was clicked last.
        clip: the name of the shipped clip that is open; None for a video of the visitor's, or a pipeline's.
        video: the file that is open; None for a pipeline's scene.
    """

    scene: Scene
    sheet: Sheet
    token: tuple[int, int, int]
    clip: str | None = None
    video: Path | None = None


def new_state(
    scene: Scene, former: State | None = None, *, clip: str | None = None, video: Path | None = None
) -> State:
    """A scene with the former state's token if the grid is the same, otherwise with the token in the middle."""
    same = former is not None and former.scene.grid == scene.grid
    token = former.token if same else tuple(side // 2 for side in scene.grid.shape)
    return State(scene, Sheet(scene), token, clip, video)


def by_policy(layers: Mapping[str, Config], layer: str) -> Config:
    """What a layer runs by a policy file: one that it does not list reads everything."""
    some = next(iter(layers.values()))
    return layers.get(layer) or method_of(some).schedule.keep(some, 1.0)


def presets() -> dict[str, Config]:
    """What the page offers under "Method": the configurations that the methods propose."""
    return {label: config for method in METHODS.values() for label, config in method.presets.items()}


def drop_limit(preset: str, keep: float) -> int | None:
    """The largest share in percent that can be dropped beside `keep`; None for a method that drops nothing."""
    return int(100 - keep) if "drop_ratio" in method_of(_preset(preset)).schedule.ratios else None


def configuration(preset: str, keep: float, drop: float) -> Config:
    """The configuration that the controls stand for; shares in percent. A method that drops nothing ignores `drop`.

    Raises:
        ValueError: for an unknown preset, or shares that do not fit together.
    """
    config = _preset(preset)
    return method_of(config).follow(config, keep_ratio=keep / 100, drop_ratio=drop / 100)


def _preset(name: str) -> Config:
    offered = presets()
    if name not in offered:
        raise ValueError(f"unknown method {name!r}; expected one of {tuple(offered)}")
    return offered[name]


def facts(seen: View, state: State, layer: str, head: int) -> str:
    """What is seen, as a Markdown table."""
    frame, row, column = state.token
    rows = (
        ("token", f"frame {frame}, row {row}, column {column}"),
        ("blocks read exactly", f"{seen.kept} of {seen.blocks}"),
        ("this token's attention mass in them", f"{100 * seen.recall:.1f} %"),
        (f"mean over head {head} of {layer}", f"{100 * seen.head_recall:.1f} %"),
        ("output error without fine-tuning, exact part only", f"{100 * seen.head_error:.1f} %"),
        ("arithmetic, all parts, against dense", f"{100 * seen.work:.1f} %"),
    )
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows)
    return f"**{state.scene.title}**\n\n| | |\n|---|---|\n{lines}"


def build_page(
    loaded: LoadedPipeline,
    size: tuple[int, int, int],
    scene: Scene | None = None,
    policy: Mapping[str, Config] | None = None,
) -> Any:
    """The gradio application.

    Args:
        loaded: the pipeline whose model looks at the clips.
        size: (frames, height, width) in pixels that it looks at.
        scene: show this one instead, without a choice of clips.
        policy: the layers of a policy file, which the page then offers as a method.
    """
    import gradio as gr

    files = {clip.name: clip.file for clip in shipped_clips("held-out")}
    clips, offered = list(files), [*presets(), *([] if policy is None else [POLICY])]
    if scene is not None:
        first = new_state(scene)
    else:
        video = files[clips[0]]
        first = new_state(clip_scene(loaded, video, size=size, noise_level=0.5), clip=clips[0], video=video)

    def slider(low: float, high: float, **options: Any) -> Any:
        """A slider whose number may be outside of the range while it is typed, where gradio's shows an error."""
        made = gr.Slider(low, high, **options)
        made.preprocess = lambda value: low if value is None else min(max(value, low), high)
        return made

    # gradio reads the annotations of its callbacks, so this module does not postpone their evaluation.
    def draw(state: State, method: str, keep: float, drop: float, layer: str, head: float):
        follows = method == POLICY
        limit = None if follows else drop_limit(method, keep)
        # What does not fit beside `keep` is not dropped, and the control says so.
        used = drop if limit is None else min(drop, limit)
        control = gr.update(interactive=limit is not None, **({} if used == drop else {"value": used}))
        try:
            config = by_policy(policy, layer) if follows else configuration(method, keep, used)
            seen = view(state.scene, config, layer=layer, head=int(head), token=state.token)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return state.sheet.draw(seen.labels, state.token).numpy(), facts(seen, state, layer, int(head)), control

    def choose(state: State, event: gr.SelectData):
        token = state.sheet.token_at(int(event.index[0]), int(event.index[1]))
        return state if token is None else replace(state, token=token)

    def opened(state: State, clip: str | None, video: Path, noise: float, window: float) -> State:
        """The state with this video; with a warning, the state as it was where the video cannot be read."""
        try:
            scene = clip_scene(loaded, video, size=size, noise_level=noise, window=window / 100)
        except (ValueError, FileNotFoundError) as error:
            gr.Warning(str(error))
            return state
        return new_state(scene, state, clip=clip, video=video)

    def sources(state: State):
        """The state, and what the two controls that choose a video say of it."""
        return state, state.clip, None if state.clip is not None else str(state.video)

    def open_clip(state: State, clip: str, noise: float, window: float):
        return sources(opened(state, clip, files[clip], noise, window))

    def open_upload(state: State, upload: str, noise: float, window: float):
        return sources(opened(state, None, Path(upload), noise, window))

    def close_upload(state: State, noise: float, window: float):
        return sources(opened(state, clips[0], files[clips[0]], noise, window))

    def move(state: State, noise: float, window: float):
        return opened(state, state.clip, state.video, noise, window)

    with gr.Blocks(title="foveal", analytics_enabled=False) as page:
        gr.Markdown(f"# Where one token looks\n{EXPLANATION}")
        state = gr.State(first)
        with gr.Row():
            with gr.Column(scale=3):
                picture = gr.Image(show_label=False, interactive=False, format="png", elem_id="sheet", buttons=[])
                table = gr.Markdown(elem_id="facts")
            with gr.Column(scale=1, min_width=260):
                method = gr.Radio(offered, value=offered[1 if policy is None else -1], label="Method", elem_id="method")
                keep = slider(1, 100, value=10, step=1, label="Keep, % of the key blocks", elem_id="keep")
                drop = slider(0, 99, value=10, step=1, label="Drop, % of the key blocks", elem_id="drop")
                layers = list(first.scene.layers)
                layer = gr.Dropdown(layers, value=layers[len(layers) // 2], label="Layer", elem_id="layer")
                heads = first.scene.layers[layers[0]][0].shape[1]
                head = slider(0, heads - 1, value=0, step=1, label="Head", elem_id="head")
                if scene is None:
                    clip = gr.Dropdown(clips, value=clips[0], label="Clip", elem_id="clip")
                    upload = gr.File(label="or a video of yours", file_types=["video"], height=150, elem_id="upload")
                    noise = slider(0.05, 0.95, value=0.5, step=0.05, label="Noise level", elem_id="noise")
                    window = slider(0, 100, value=50, step=1, label="Where in the clip, %", elem_id="window")
        controls = [state, method, keep, drop, layer, head]
        shown = {"inputs": controls, "outputs": [picture, table, drop], "show_progress": "hidden"}
        page.load(draw, **shown)
        page.load(None, js=ENTER_ENDS_TYPING)
        # A slider changes by its handle, by its arrow keys, by its number field, and when its value is clamped.
        for control in (method, layer, keep, drop, head):
            control.change(draw, **shown)
        picture.select(choose, [state], [state], show_progress="hidden").then(draw, **shown)
        if scene is None:
            places, chosen = [noise, window], [state, clip, upload]
            clip.input(open_clip, [state, clip, *places], chosen).then(draw, **shown)
            upload.upload(open_upload, [state, upload, *places], chosen).then(draw, **shown)
            upload.clear(close_upload, [state, *places], chosen).then(draw, **shown)
            for place in places:
                place.change(move, [state, *places], [state]).then(draw, **shown)
    return page
