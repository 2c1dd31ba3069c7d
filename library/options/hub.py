"""Options of uploads to a repository on Hugging Face's hub, and of going on from a state there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from library.errors import OptionError, did_you_mean
from library.options.declare import check_values, option, settle

REPO_TYPES = ("model", "dataset", "space")
VISIBILITIES = ("private", "public")
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Where saved files go besides the output folder."""

    huggingface_repo_id: str | None = option(
        None, "Upload every saved file to this hub repository, OWNER/NAME, which is made when missing."
    )
    huggingface_repo_type: str | None = option(None, "Kind of repository: model (when unset), dataset or space.")
    huggingface_path_in_repo: str | None = option(None, "Folder in the repository; unset is its top.")
    huggingface_token: str | None = option(
        None, "Token for uploads and for --resume_from_huggingface; unset is the login of the hf command.",
        is_secret=True,
    )  # fmt: skip
    huggingface_repo_visibility: str | None = option(
        None, "Who may see a repository that is made: private (when unset) or public."
    )
    save_state_to_huggingface: bool = option(False, "Upload the states of --save_state too.")
    resume_from_huggingface: bool = option(
        False, "Take --resume for a place on the hub: OWNER/NAME/FOLDER, with :REVISION and :REPO_TYPE where needed."
    )
    async_upload: bool = option(False, "Upload beside training; the run waits for the rest at its end.")

    def __post_init__(self) -> None:
        """Check the values; bring them into the form in which the hub takes them."""
        check_values(self)
        if self.huggingface_repo_id is not None and not REPO_ID.fullmatch(self.huggingface_repo_id):
            raise OptionError(
                f"--huggingface_repo_id must be OWNER/NAME, like jane/my-lora; got {self.huggingface_repo_id}."
            )
        for name, choices in (
            ("huggingface_repo_type", REPO_TYPES),
            ("huggingface_repo_visibility", VISIBILITIES),
        ):
            value = getattr(self, name)
            if value is not None:
                settle(self, name, _one_of(f"--{name}", value, choices))
        if self.huggingface_path_in_repo is not None:
            folder = _folder("--huggingface_path_in_repo", self.huggingface_path_in_repo)
            settle(self, "huggingface_path_in_repo", folder or None)
        if self.huggingface_token is not None:
            token = self.huggingface_token.strip()  # pasted with a line break
            if not token.isascii() or not token.isprintable() or " " in token:  # not shown: it is a secret
                raise OptionError("--huggingface_token has characters that are in no token. Copy it once more.")
            settle(self, "huggingface_token", token or None)


@dataclass(frozen=True)
class HubPlace:
    """A folder in a repository on the hub."""

    repo_id: str
    folder: str  # without slashes at its ends
    revision: str | None = None  # None: the main branch
    repo_type: str = "model"


def hub_place(text: str) -> HubPlace:
    """Return the place that --resume names with --resume_from_huggingface: OWNER/NAME/FOLDER[:REVISION[:REPO_TYPE]].

    Raises: OptionError.
    """
    wanted = "with --resume_from_huggingface it must be OWNER/NAME/FOLDER, or OWNER/NAME/FOLDER:REVISION:REPO_TYPE"
    place, *details = text.split(":")
    owner, _, rest = place.partition("/")
    name, _, folder = rest.partition("/")
    if not REPO_ID.fullmatch(f"{owner}/{name}") or not folder.strip("/") or len(details) > 2:
        raise OptionError(f"--resume {text}: {wanted}.")
    revision, repo_type = [*details, "", ""][:2]
    return HubPlace(
        f"{owner}/{name}",
        _folder(f"--resume {text}:", folder),
        revision or None,
        _one_of(f"--resume {text}: the type of the repository", repo_type, REPO_TYPES) if repo_type else "model",
    )


def _one_of(where: str, value: str, choices: tuple[str, ...]) -> str:
    if value.lower() not in choices:
        near = did_you_mean(value.lower(), choices)
        raise OptionError(f"{where} must be {', '.join(choices[:-1])} or {choices[-1]}; got {value}.{near}")
    return value.lower()


def _folder(where: str, value: str) -> str:
    """Return a folder of a repository without the slashes at its ends; "" for the top."""
    folder = value.replace("\\", "/").strip("/ ")
    if any(part in ("", ".", "..", ".git") for part in folder.split("/")) and folder:
        raise OptionError(f"{where} must be a folder like loras/zundamon, got {value}.")
    return folder
