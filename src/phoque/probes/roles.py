"""The bank of roles: other characters, so that a persona is ranked among many instead of beside one placebo.

Ranking among roles is how the assistant axis was found (275 roles, https://arxiv.org/abs/2601.10387). Here the roles
are the null: a finding that any other role in the persona's place would give as well is not about the persona.
"""

import tomllib
from dataclasses import dataclass
from importlib.resources import files

from phoque.errors import UsageError
from phoque.files import expand_user
from phoque.probes.persona import CONDITIONS, Persona
from phoque.probes.word_profile import stems

BUNDLED, NONE = "bundled", "none"
RESERVED = {*CONDITIONS, "text_persona", "text_neutral", "before"}  # other conditions of the probe
SHARED_WORDS = 3  # of a role's prompt with the persona's lexicon, that make it the same character
MIN_RANKED = 19  # with fewer other roles, no rank among them has a p of 0.05


@dataclass(frozen=True)
class Role:
    """A character and the system prompt that asks for it."""

    name: str
    prompt: str


def load_roles(name: str, persona: Persona) -> tuple[Role, ...]:
    """Load the roles of a .toml file, the `bundled` ones, or `none`, without the role that is the persona itself.

    A role is left out if it has the persona's name or one of its prompts, or if its prompt has three words of the
    persona's lexicon: it would be a twin that the persona competes with. Raises UsageError for a file that is missing
    or has other content.
    """
    if name == NONE:
        return ()
    path = expand_user(name)
    if name == BUNDLED:
        text = files("phoque").joinpath("assets", "roles.toml").read_text("utf-8")
    elif path.is_file():
        text = path.read_text("utf-8", errors="replace")
    else:
        raise UsageError(
            what=f"No file of roles at {path}.",
            why=f"--roles takes {BUNDLED!r}, {NONE!r} or a .toml file.",
            fix="Check --roles.",
        )
    try:
        entries = tomllib.loads(text).get("role", [])
        roles = [Role(entry["name"].strip(), entry["prompt"].strip()) for entry in entries]
    except (tomllib.TOMLDecodeError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(what=f"{name} is not a file of roles.", why=f"{error!r}.", fix=_EXAMPLE) from error
    names = [role.name for role in roles]
    if not roles or not all(role.name and role.prompt for role in roles) or len(set(names)) < len(names):
        raise UsageError(
            what=f"{name} is not a file of roles.",
            why="It has no role, one without a name or a prompt, or two of the same name.",
            fix=_EXAMPLE,
        )
    if taken := RESERVED & set(names):
        raise UsageError(
            what=f"{name} has a role named {taken.pop()!r}.",
            why="The probe uses this name for something else.",
            fix="Give the role another name.",
        )
    texts = {persona.name.lower(), *persona.persona}
    typical = set().union(*(stems(word) for word in persona.lexicon))
    return tuple(
        role
        for role in roles
        if role.name.lower() not in texts
        and role.prompt not in texts
        and len(stems(role.prompt) & typical) < SHARED_WORDS
    )


_EXAMPLE = "Each role is a [[role]] with a name and a prompt; assets/roles.toml in the installed package is an example."
