"""The Hugging Face Hub as a network service: its timeout, its errors, and its availability."""

from __future__ import annotations

#: Seconds after which the hub counts as unreachable if a short request gets no answer.
TIMEOUT_S = 5.0
#: Packages that make the requests; their errors have no common base class.
_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"})


def is_network_error(error: BaseException) -> bool:
    """Return whether an error comes from the hub, the network, or the local files of a download."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, (HfHubHTTPError, OSError)):
        return True
    return any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)


def is_reachable(name: str, revision: str | None) -> bool:
    """Return whether the hub answers a request for a model, tried once with a short timeout.

    Downloads retry for 24 seconds if nothing answers.

    Raises
    ------
    huggingface_hub.errors.HfHubHTTPError
        If the hub has no such model or revision, or denies access to it.
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
