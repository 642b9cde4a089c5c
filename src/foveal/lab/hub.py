"""The Hugging Face hub: whether a name is of the hub, and whether the hub can be reached."""

from __future__ import annotations

import functools
from pathlib import Path


def is_hub_id(source: str) -> bool:
    """Whether this looks like OWNER/NAME and is no local path."""
    return not Path(source).exists() and source.count("/") == 1 and not source.startswith((".", "/", "~"))


def hub_options(source: str) -> dict[str, bool]:
    """Options for whatever loads a folder or a hub id: only from the local cache if the hub cannot be reached.

    Without them, every file is tried again and again, and the message at the end is about something else.

    Raises:
        ValueError: a hub id that cannot be downloaded and of which the local cache has nothing.
    """
    why = hub_unreachable() if is_hub_id(source) else None
    if why is None:
        return {}
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="model")).is_dir():
        raise ValueError(
            f"{source} cannot be downloaded: {constants.ENDPOINT} cannot be reached ({why}). Nor is it a local folder "
            "or in the local cache"
        )
    return {"local_files_only": True}


@functools.cache
def hub_unreachable() -> str | None:
    """Why the Hugging Face hub cannot be reached; None if it can. Each process asks once, and not again."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # Of the HTTP library, which is not always the same one.
        return one_line(error)
    return None


def one_line(error: Exception) -> str:
    """What an exception says, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]
