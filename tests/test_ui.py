"""The page of `foveal ui`: what it shows is what the methods choose, and a browser can click it."""

import shutil
import socket

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("av")

from foveal import SLA2Config, SLAConfig, VideoGrid, VSAConfig
from foveal.lab import cli
from foveal.lab.data.windows import sample_clip
from foveal.lab.pipelines import load_pipeline
from foveal.lab.ui.scene import Scene, Sheet, clip_scene, pipeline_scene, scene_size, view
from foveal.models.shipped import TINY, shipped_clips

FIRST, OTHER = [clip.name for clip in shipped_clips("held-out")][:2]
# Six blocks of tokens.
SIZE = (13, 128, 192)


@pytest.fixture(scope="module")
def tiny():
    return load_pipeline(TINY, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def scene(tiny):
    return clip_scene(tiny, sample_clip("bigbuckbunny"), size=SIZE, noise_level=0.5)


def test_scene_holds_the_clip_and_every_layer(scene):
    assert scene.frames.shape == (4, 128, 192, 3)
    assert scene.grid == VideoGrid(4, 8, 12)
    assert list(scene.layers) == [f"blocks.{layer}.attn1" for layer in range(6)]
    assert scene.layers["blocks.1.attn1"][0].shape == (1, 4, 384, 64)


def test_a_size_is_the_users_then_the_models(tiny):
    assert scene_size(tiny, (None, None, None)) == (49, 144, 256)
    assert scene_size(tiny, (13, None, 192)) == (13, 144, 192)


def made_scene():
    """Tokens of four cubes, each of which likes only its own cube."""
    grid = VideoGrid(4, 4, 16)
    cube = torch.arange(16).div(4, rounding_mode="floor").repeat(16)
    x = torch.nn.functional.one_hot(cube, 16).float()[None, None] * 12
    frames = torch.full((4, 8, 32, 3), 200, dtype=torch.uint8)
    return Scene("made", frames, grid, {"only": (x, x, x)})


@pytest.mark.parametrize(
    "config", [SLAConfig(keep_ratio=0.25, drop_ratio=0.25, token_order="tile"), VSAConfig(keep_ratio=0.25)]
)
def test_a_token_sees_its_own_cube(config):
    seen = view(made_scene(), config, layer="only", head=0, token=(1, 2, 9))
    assert (seen.labels[:, :, 8:12] == 1).all()
    assert (seen.labels == 1).sum() == 64
    assert (seen.kept, seen.blocks) == (1, 4)
    assert seen.recall > 0.99
    assert seen.head_recall > 0.99
    assert seen.head_error < 0.01
    if isinstance(config, SLAConfig):
        assert sorted(seen.labels.unique().tolist()) == [-1, 0, 1]


@pytest.mark.parametrize(
    "config",
    [
        SLA2Config(keep_ratio=0.25, block_q=64),
        SLA2Config(keep_ratio=0.25, block_q=64, linear_scope="none", router="per_head", token_order="tile"),
        VSAConfig(keep_ratio=0.25, router="per_head"),
        VSAConfig(keep_ratio=(0.1, 0.2, 0.5, 0.25)),
    ],
)
def test_the_last_of_several_heads(scene, config):
    seen = view(scene, config, layer="blocks.1.attn1", head=3, token=(1, 2, 9))
    assert (seen.kept, seen.blocks) == (2 if isinstance(config, VSAConfig) else 1, 6)  # which rounds up
    assert 0 < seen.head_recall < 1


def test_raster_order_mixes_the_cubes():
    seen = view(made_scene(), SLAConfig(keep_ratio=0.25, drop_ratio=0.0), layer="only", head=0, token=(1, 2, 9))
    # A block is a frame, a quarter of it the token's own cube.
    assert seen.head_recall == pytest.approx(0.25, abs=0.01)
    assert (seen.labels == 1).sum() == 64


def test_sheet_draws_and_finds_tokens():
    scene = made_scene()
    sheet = Sheet(scene, columns=2, width=140)
    assert sheet.factor == 2
    seen = view(scene, VSAConfig(keep_ratio=0.25), layer="only", head=0, token=(3, 0, 0))
    drawn = sheet.draw(seen.labels, (3, 0, 0))
    assert tuple(drawn.shape) == (2 * sheet.cell[0], 2 * sheet.cell[1], 3)
    # Frame 0: the first cube is bright, the others dim.
    assert drawn[8, 4].tolist() == [200, 200, 200]
    assert drawn[8, 40].tolist() == [84, 84, 84]
    # Frame 3 is at the right of the second row; its first token is framed.
    top, left = sheet.cell
    assert drawn[top, left].tolist() == [230, 40, 40]
    for token in ((0, 0, 0), (1, 3, 15), (3, 2, 7)):
        frame, row, column = token
        y = (frame // 2) * sheet.cell[0] + row * 4 + 1
        x = (frame % 2) * sheet.cell[1] + column * 4 + 1
        assert sheet.token_at(x, y) == token
    assert sheet.token_at(sheet.cell[1] - 1, 0) is None


def test_a_pipeline_can_be_looked_at(tmp_path):
    pytest.importorskip("transformers")
    from tiny_media import save_tiny_wan

    from foveal.lab.pipelines import load_pipeline

    loaded = load_pipeline(save_tiny_wan(tmp_path / "wan"), device=torch.device("cpu"), dtype=torch.float32)
    steps = []
    scene = pipeline_scene(
        loaded, "a bar", step=1, size=(9, 48, 64), num_inference_steps=2, on_step=lambda: steps.append(1)
    )
    assert len(steps) == 2
    assert scene.grid == VideoGrid(3, 3, 4)
    assert tuple(scene.frames.shape) == (3, 48, 64, 3)
    layer = next(iter(scene.layers))
    seen = view(scene, SLAConfig(keep_ratio=1.0, drop_ratio=0.0), layer=layer, head=0, token=(0, 0, 0))
    assert seen.recall == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match=r"step must be in \[0, 2\), got 2"):
        pipeline_scene(loaded, "a bar", step=2, size=(9, 48, 64), num_inference_steps=2)


def test_mistakes(tiny, scene, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no such video file"):
        clip_scene(tiny, tmp_path / "none.mp4", size=SIZE, noise_level=0.5)
    with pytest.raises(ValueError, match="noise_level must be above 0 and below 1, got 1"):
        clip_scene(tiny, sample_clip("bikes"), size=SIZE, noise_level=1.0)
    with pytest.raises(ValueError, match=r"bikes\.mp4 has 250 frames, but 401 are needed"):
        clip_scene(tiny, sample_clip("bikes"), size=(401, 128, 192), noise_level=0.5)
    with pytest.raises(ValueError, match=r"unknown layer 'blocks\.9'"):
        view(scene, VSAConfig(), layer="blocks.9", head=0, token=(0, 0, 0))
    with pytest.raises(ValueError, match=r"head must be in \[0, 4\), got 5"):
        view(scene, VSAConfig(), layer="blocks.0.attn1", head=5, token=(0, 0, 0))
    with pytest.raises(ValueError, match="token must lie in the grid"):
        view(scene, VSAConfig(), layer="blocks.0.attn1", head=0, token=(4, 0, 0))
    pytest.importorskip("tyro")
    pytest.importorskip("gradio")
    assert cli.main(["ui", "--model", str(tmp_path)]) == 2
    assert "has no model_index.json" in capsys.readouterr().err


def test_the_address_is_printed_before_it_serves(monkeypatch, capsys):
    pytest.importorskip("tyro")
    pytest.importorskip("gradio")
    from foveal.lab.ui import page

    printed = []

    class Page:
        def launch(self, *, prevent_thread_lock, **options):
            assert prevent_thread_lock
            return None, f"http://{options['server_name']}:{options['server_port']}/", None

        def block_thread(self):
            printed.append(capsys.readouterr().out)

    monkeypatch.setattr(page, "build_page", lambda loaded, size, scene, policy: Page())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert cli.main(["ui", "--port", str(port), "--no-open-browser"]) == 0
    assert printed == [f"http://127.0.0.1:{port}/\n"]


def test_addresses_that_cannot_be_served_at(capsys):
    pytest.importorskip("tyro")
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            (("--port", "99999"), "--port must be in 1..65535, got 99999"),
            (("--port", str(port)), f"port {port} of 127.0.0.1 is in use; choose another --port"),
            (("--host", "192.0.2.7"), "cannot serve at --host 192.0.2.7: "),
        ):
            assert cli.main(["ui", *arguments]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"foveal: {message}")
            assert error.count("\n") == 1


def test_controls_stand_for_configurations():
    pytest.importorskip("gradio")
    from foveal.lab.ui.page import configuration, drop_limit

    assert configuration("VSA", 25, 50) == VSAConfig(keep_ratio=0.25)
    assert configuration("SLA, tile order", 95, 5) == SLAConfig(keep_ratio=0.95, drop_ratio=0.05, token_order="tile")
    assert drop_limit("SLA, tile order", 95) == 5
    assert drop_limit("VSA", 25) is None
    with pytest.raises(ValueError, match="unknown method"):
        configuration("dense", 1, 1)


@pytest.fixture
def address(tiny):
    """Where the page is served."""
    pytest.importorskip("gradio")
    from foveal.lab.ui.page import build_page

    page = build_page(tiny, SIZE)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, inbrowser=False)
    yield address
    page.close()


def test_controls_follow_what_is_drawn(address):
    """Over HTTP, as the page asks: what cannot be dropped is not, and the control is told so."""
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)

    def draw(method, keep, drop, head=0):
        _, facts, control = client.predict(method, keep, drop, "blocks.1.attn1", head, api_name="/draw")
        return facts, control

    facts, control = draw("SLA, tile order", 50, 10)
    assert "| blocks read exactly | 3 of 6 |" in facts
    assert control["interactive"]
    assert "value" not in control
    facts, control = draw("SLA, tile order", 50, 90)
    assert control["value"] == 50
    assert not draw("VSA", 50, 90)[1]["interactive"]
    # Numbers out of range, as a number field sends them while they are typed.
    assert "| blocks read exactly | 6 of 6 |" in draw("VSA", 500, 0)[0]
    assert "mean over head 3 of blocks.1.attn1" in draw("VSA", 50, 0, head=7)[0]


def test_the_open_video_is_what_the_controls_say(address, tmp_path):
    client = pytest.importorskip("gradio_client").Client(address, verbose=False)
    handle_file = pytest.importorskip("gradio_client").handle_file
    mine, junk = tmp_path / "mine.mp4", tmp_path / "junk.mp4"
    shutil.copyfile(sample_clip("bikes"), mine)
    junk.write_text("no video")

    def title():
        return client.predict("VSA", 50, 0, "blocks.1.attn1", 0, api_name="/draw")[1].splitlines()[0]

    clip, upload = client.predict(handle_file(mine), 0.5, 50, api_name="/open_upload")
    assert (clip, upload.endswith("mine.mp4")) == (None, True)
    assert title() == "**mine.mp4, noise level 0.5**"
    client.predict(0.25, 10, api_name="/move")
    assert title() == "**mine.mp4, noise level 0.25**"
    assert client.predict(OTHER, 0.5, 50, api_name="/open_clip") == (OTHER, None)
    assert title() == f"**{OTHER}.mp4, noise level 0.5**"
    # A file that is no video leaves everything as it was.
    assert client.predict(handle_file(junk), 0.5, 50, api_name="/open_upload") == (OTHER, None)
    assert title() == f"**{OTHER}.mp4, noise level 0.5**"
    client.predict(handle_file(mine), 0.5, 50, api_name="/open_upload")
    assert client.predict(0.5, 50, api_name="/close_upload") == (FIRST, None)
    assert title() == f"**{FIRST}.mp4, noise level 0.5**"


def test_in_a_browser(address, tmp_path):
    """Loads the page in headless Chromium, clicks a token, and moves the controls in every way there is."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1000})
        # On busy cores the server and the browser wait for each other for long.
        tab.set_default_timeout(180000)
        tab.goto(address)
        facts = tab.locator("#facts")
        facts.get_by_text("frame 2, row 4, column 6").wait_for()
        facts.get_by_text("1 of 6").wait_for()
        picture = tab.locator("#sheet img")
        size = picture.bounding_box()
        # Forced: whether the picture stands still and uncovered is no concern of this test.
        picture.click(force=True, position={"x": size["width"] * 0.03, "y": size["height"] * 0.03})
        facts.get_by_text("frame 0, row 0, column 0").wait_for()
        first = picture.get_attribute("src")
        keep, drop = tab.locator("#keep input[type=number]"), tab.locator("#drop input[type=number]")
        # Arrow keys, without a pointer.
        slider = tab.locator("#keep input[type=range]")
        slider.focus()
        for _ in range(40):
            slider.press("ArrowRight")
        facts.get_by_text("3 of 6").wait_for()
        assert picture.get_attribute("src") != first
        # Enter. What can no longer be dropped leaves the other control too.
        keep.fill("95")
        keep.press("Enter")
        facts.get_by_text("5 of 6").wait_for()
        tab.wait_for_function("document.querySelector('#drop input[type=number]').value === '5'")
        # A number out of range becomes the nearest one, in the picture and in the field.
        keep.fill("500")
        keep.press("Enter")
        facts.get_by_text("6 of 6").wait_for()
        assert keep.input_value() == "100"
        keep.fill("20")
        keep.press("Tab")
        facts.get_by_text("1 of 6").wait_for()
        tab.get_by_label("VSA", exact=True).check()
        tab.wait_for_function("document.querySelector('#drop input[type=number]').disabled")
        assert drop.is_disabled()
        clip = tab.locator("#clip input")
        tab.locator("#upload input[type=file]").set_input_files(sample_clip("bikes"))
        facts.get_by_text("bikes.mp4").wait_for()
        tab.wait_for_function("document.querySelector('#clip input').value === ''")
        clip.click()
        tab.get_by_role("option", name=FIRST).click()
        facts.get_by_text(f"{FIRST}.mp4").wait_for()
        tab.locator("#upload").get_by_text("Drop File Here").wait_for()
        tab.screenshot(path=tmp_path / "page.png")
        browser.close()
    assert (tmp_path / "page.png").stat().st_size > 20000
