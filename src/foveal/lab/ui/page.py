"""The page of `foveal ui`: pick a clip, a layer and a head, click a token, move the sliders.

It needs gradio. By default only this machine can reach the page, and nothing is sent anywhere.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from foveal.lab.data.windows import SAMPLE_CLIPS, sample_clip
from foveal.lab.ui.scene import Scene, Sheet, View, demo_scene, view
from foveal.methods.base import METHODS, Config, method_of

EXPLANATION = (
    "Click a token. **Bright** tokens it reads exactly, **dim** ones through the global branch (SLA's linear branch, "
    "VSA's coarse stage), **dark** ones not at all. The red frame is the token itself."
)


@dataclass(frozen=True)
class State:
    """What one visitor looks at: a scene, its sheet of frames, and the token that was clicked last."""

    scene: Scene
    sheet: Sheet
    token: tuple[int, int, int]


def new_state(scene: Scene) -> State:
    """A scene with the token in the middle chosen."""
    return State(scene, Sheet(scene), tuple(side // 2 for side in scene.grid.shape))


def presets() -> dict[str, Config]:
    """What the page offers under "Method": the configurations that the methods propose."""
    return {label: config for method in METHODS.values() for label, config in method.presets.items()}


def configuration(preset: str, keep: float, drop: float) -> Config:
    """The configuration that the controls stand for; shares in percent.

    Raises:
        ValueError: for an unknown preset, or shares that do not fit together.
    """
    offered = presets()
    if preset not in offered:
        raise ValueError(f"unknown method {preset!r}; expected one of {tuple(offered)}")
    config = offered[preset]
    return method_of(config).follow(config, keep_ratio=keep / 100, drop_ratio=min(drop, 100 - keep) / 100)


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


def build_page(folder: Path, scene: Scene | None = None) -> Any:
    """The gradio application.

    Args:
        folder: what `foveal demo` wrote; its model looks at the clips.
        scene: show this one instead (a pipeline's), without a choice of clips.

    Raises:
        FileNotFoundError: a folder without the demo's model.
    """
    import gradio as gr

    clips, offered = list(SAMPLE_CLIPS), list(presets())
    first = new_state(scene or demo_scene(folder, sample_clip(clips[0]), noise_level=0.5))

    # gradio reads the annotations of its callbacks, so this module does not postpone their evaluation.
    def draw(state: State, method: str, keep: float, drop: float, layer: str, head: float):
        try:
            config = configuration(method, keep, drop)
            seen = view(state.scene, config, layer=layer, head=int(head), token=state.token)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return state.sheet.draw(seen.labels, state.token).numpy(), facts(seen, state, layer, int(head))

    def choose(state: State, event: gr.SelectData):
        token = state.sheet.token_at(int(event.index[0]), int(event.index[1]))
        return state if token is None else replace(state, token=token)

    def open_clip(clip: str, upload: str | None, noise: float, window: float):
        try:
            video = Path(upload) if upload else sample_clip(clip)
            return new_state(demo_scene(folder, video, noise_level=noise, window=window / 100))
        except (ValueError, FileNotFoundError) as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="foveal", analytics_enabled=False) as page:
        gr.Markdown(f"# Where one token looks\n{EXPLANATION}")
        state = gr.State(first)
        with gr.Row():
            with gr.Column(scale=3):
                picture = gr.Image(show_label=False, interactive=False, format="png", elem_id="sheet", buttons=[])
                table = gr.Markdown(elem_id="facts")
            with gr.Column(scale=1, min_width=260):
                method = gr.Radio(offered, value=offered[1], label="Method", elem_id="method")
                keep = gr.Slider(1, 100, value=10, step=1, label="Keep, % of the key blocks", elem_id="keep")
                drop = gr.Slider(0, 100, value=10, step=1, label="Drop, % (SLA)", elem_id="drop")
                layers = list(first.scene.layers)
                layer = gr.Dropdown(layers, value=layers[len(layers) // 2], label="Layer", elem_id="layer")
                heads = first.scene.layers[layers[0]][0].shape[1]
                head = gr.Slider(0, heads - 1, value=0, step=1, label="Head", elem_id="head")
                if scene is None:
                    clip = gr.Dropdown(clips, value=clips[0], label="Clip", elem_id="clip")
                    upload = gr.File(label="or a video of yours", file_types=["video"], height=150)
                    noise = gr.Slider(0.05, 0.95, value=0.5, step=0.05, label="Noise level", elem_id="noise")
                    window = gr.Slider(0, 100, value=50, step=1, label="Where in the clip, %")
                    opened = [clip, upload, noise, window]
        controls = [state, method, keep, drop, layer, head]
        shown = {"inputs": controls, "outputs": [picture, table], "show_progress": "hidden"}
        page.load(draw, **shown)
        for control in (method, layer):
            control.change(draw, **shown)
        for slider in (keep, drop, head):
            slider.release(draw, **shown)
        picture.select(choose, [state], [state], show_progress="hidden").then(draw, **shown)
        if scene is None:
            for event in (clip.change, upload.change, noise.release, window.release):
                event(open_clip, opened, [state]).then(draw, **shown)
    return page
