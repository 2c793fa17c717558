"""What a service needs besides its settings, carried as one object instead of four parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.hub.client import LOOKUP_PATIENCE_S, Hub
from phoque.settings.environment import cache_folder
from phoque.settings.fields import Resolved, Secrets


@dataclass(frozen=True)
class Services:
    """The console that shows progress, the Hub's client, phoque's cache folder, and the secrets of this process."""

    console: Console
    hub: Hub
    cache: Path
    secrets: Secrets

    @classmethod
    def create(cls, resolved: Resolved[Any], console: Console) -> "Services":
        """The services of one command: its token, its --retry-timeout, and the cache folder of this user."""
        hub = Hub(resolved.secrets.hub, console.say, resolved.settings.hub_patience)
        return cls(console, hub, cache_folder(), resolved.secrets)

    @classmethod
    def without_token(cls, console: Console, cache: Path) -> "Services":
        """Services that read only what is public or local, for programs that call parts of phoque by themselves."""
        return cls(console, Hub(None, console.say, LOOKUP_PATIENCE_S), cache, Secrets())
