"""The Hugging Face hub, asked in a way that fails at once and says why.

`huggingface_hub` and `datasets` download, cache and resume; but where there is no network they try for half a minute
and then tell of the last thing that failed rather than of the first.
"""

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache


def check_reachable(repository: str, file: str, revision: str, repo_type: str = "model") -> None:
    """Asks the hub for a file's metadata, once, unless the file is cached; raises what the library raises."""
    if not try_to_load_from_cache(repository, file, revision=revision, repo_type=repo_type):
        get_hf_file_metadata(hf_hub_url(repository, file, revision=revision, repo_type=repo_type))


def reason(error: Exception) -> str:
    """The cause beneath an error of these libraries, in a line."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0]
