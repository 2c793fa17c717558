"""What a service needs besides its settings, carried as one object instead of four parameters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phoque.console import Console
from phoque.hub.client import Hub
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
        """The services of one command: its token, its --hub-patience, and the cache folder of this user."""
        hub = Hub(resolved.secrets.hub, console.say, resolved.settings.hub_patience)
        return cls(console, hub, cache_folder(), resolved.secrets)
