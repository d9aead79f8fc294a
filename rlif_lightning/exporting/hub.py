"""Send an export to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlif_lightning.errors import UserError
from rlif_lightning.models.hub import hub_answers, is_local
from rlif_lightning.toy import parse_toy_name


def is_on_hub(name: str) -> bool:
    """Whether a model or data set is neither a folder nor the toy."""
    return parse_toy_name(name) is None and not is_local(name)


def check_hub(repository: str) -> None:
    """Refuse a push that can't work, before a model is loaded."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        wrong = "--push_to_hub takes the name of a repository"
        raise UserError(wrong, got=repository, expected="such as you/model") from error
    if not hub_answers():
        wrong = "The Hugging Face hub does not answer or is off (HF_HUB_OFFLINE), so nothing can be pushed"
        raise UserError(wrong, do="leave out --push_to_hub; later: hf upload NAME FOLDER")
    if get_token() is None:
        raise UserError("Nobody is logged in to the Hugging Face hub", do="run hf auth login, or set HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Upload an export and return the commit's address; a new repository is private."""
    api = HfApi()
    try:
        made = api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        return str(api.upload_folder(folder_path=str(folder), repo_id=made.repo_id, repo_type="model"))
    except Exception as error:  # errors of the hub's http library too, which differs by version
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        do = f"the folder is complete; later: hf upload {repository} {folder}"
        raise UserError("The Hugging Face hub refuses the export", got=f"{repository}: {reason}", do=do) from error
