"""Upload a verified export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id

FLAG = "--push-to-hub"


def check(name: str, *, verify: bool) -> None:
    """ValueError, before anything is written, for what no upload could do: an unverified folder, a
    name without its owner, a machine that is not logged in."""
    if not verify:
        raise ValueError(f"{FLAG} {name}: only verified exports are uploaded (--no-verify)")
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise ValueError("OWNER/NAME is needed")
        HfApi().whoami()
    except (HTTPError, ValueError, OSError) as error:
        raise ValueError(f"{FLAG} {name}: {_line(error)}") from None


def push(folder: Path, name: str, message: str) -> str:
    """Upload the files of ``folder`` as one commit; returns the URL of it. A repository that is not
    there is made, private. ValueError names the command that tries again."""
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        info = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except (HTTPError, ValueError, OSError) as error:
        raise ValueError(
            f"{FLAG} {name}: {_line(error)}; the export is complete, to try again:"
            f" hf upload {name} {folder}"
        ) from None
    return str(info.commit_url)


def _line(error: Exception) -> str:
    """The first line that is not empty; errors of the hub are paragraphs."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
