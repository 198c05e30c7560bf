"""Whether the Hugging Face Hub responds, by one short request; its libraries would retry for half a minute."""

from __future__ import annotations

from huggingface_hub import constants
from huggingface_hub.utils import get_session

TIMEOUT = 5.0  # seconds in which the hub must respond


def responds() -> bool:
    """False without a network and in offline mode, where only what has been downloaded can be used."""
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # whatever the HTTP client raises
        return False
    return True
