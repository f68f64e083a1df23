"""The page: its tabs, mounted on the server's app. No analytics, no share link, no file outside the page's folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import FastAPI

PATH = "/studio"


def mount(app: FastAPI, drawing: Any, settings: Any) -> str:
    """Mount the page on an app -> its path. `drawing` and `settings` are those of `lens_serve.pages`."""
    # gradio reads these when it is imported and when a page is built.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(settings.scratch)  # uploads and pictures; all that it serves as files
    import gradio as gr

    from lens_studio import compare, draw, results, runs

    drawer = draw.Drawer(drawing, settings.scratch)
    with gr.Blocks(analytics_enabled=False, title=f"Lens: {drawing.name}", delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(f"# Lens\n{drawing.name}")
        with gr.Tab("Draw"):
            draw.tab(drawing, drawer)
        with gr.Tab("Compare"):
            compare.tab(drawing, compare.Comparer(drawing, settings.models))
        with gr.Tab("Runs"):
            runs.tab(settings.runs)
        with gr.Tab("Results"):
            results.tab(settings.results)
        blocks.unload(_leaving(drawer))
    blocks.queue(max_size=256, api_open=False)
    gr.mount_gradio_app(
        app, blocks, PATH, footer_links=[], run_history=False, app_kwargs={"docs_url": None, "redoc_url": None},
        allowed_paths=[], max_file_size=settings.max_upload, ssr_mode=False, pwa=False, mcp_server=False,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]), enable_monitoring=False,
    )  # fmt: skip
    app.state.on_exit = [*getattr(app.state, "on_exit", ()), _mounted(app).stop_event.set]
    return PATH


def _mounted(app: FastAPI) -> Any:
    """gradio's app on PATH, which keeps a connection to each window open until its `stop_event`."""
    (route,) = [route for route in app.routes if getattr(route, "path", "") == PATH]
    mounted: Any = route
    while not hasattr(mounted, "stop_event"):
        mounted = mounted.app
    return mounted


def _leaving(drawer: Any) -> Any:
    """What is called when a window is closed: its request is cancelled."""
    import gradio as gr

    def leave(request: gr.Request) -> None:
        drawer.stop(str(request.session_hash))

    leave.__annotations__["request"] = gr.Request
    return leave
