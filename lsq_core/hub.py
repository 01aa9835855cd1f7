"""The Hugging Face Hub as a network service: how long to wait for it, and which errors are its."""

from __future__ import annotations

#: Seconds that a short request may take before the hub counts as out of reach.
TIMEOUT_S = 5.0
#: Packages that make the requests; their errors have no base class in common.
_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"})


def is_network_error(error: BaseException) -> bool:
    """Whether an error is of the hub, of the way there, or of the files it was to be kept in."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, (HfHubHTTPError, OSError)):
        return True
    return any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)


def is_reachable(name: str, revision: str | None) -> bool:
    """Whether the hub can be asked for a model now; one short request, which isn't repeated.

    Downloads repeat theirs for 24 seconds where nothing answers.

    Raises
    ------
    huggingface_hub.errors.HfHubHTTPError
        What the hub answered where it has no such model or revision, or keeps it from this person.
    """
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return False
    try:
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT_S)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code < 500:
            raise
        return False
    except Exception as error:
        if not is_network_error(error):
            raise
        return False
    return True
