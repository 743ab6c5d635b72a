"""The client of huggingface_hub in this process, turned to a Hub on the loopback device, with a cache of its own."""

from contextlib import contextmanager
from types import SimpleNamespace

import huggingface_hub
from huggingface_hub import constants

from .loopback_hub import TOKEN, LoopbackHub


def use(hub: LoopbackHub, cache, monkeypatch) -> None:
    """All requests go to `hub`; by default with its user's token."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    no_wait = SimpleNamespace(sleep=lambda seconds: None)  # between attempts at a download
    monkeypatch.setattr("huggingface_hub.file_download.time", no_wait)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "*")


@contextmanager
def counted(hub: LoopbackHub):
    """Gives a list that has the requests of the block after it."""
    hub.log.clear()
    requests: list[str] = []
    yield requests
    requests += hub.log


def api(hub: LoopbackHub) -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi(endpoint=hub.endpoint, token=TOKEN)
